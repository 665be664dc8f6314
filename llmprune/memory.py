"""How much memory a job needs: one set of formulas for the walk's choice of batch and for ``llmprune plan``.

H hidden, T tokens of one forward, I in and O out features of a site. All results are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.anatomy.sites import Site
from llmprune.hidden import Place
from llmprune.spec import Need, Offload

STAGED_TOKENS = 8192
CPU_STAGED_TOKENS = 2048
"""Tokens of one forward when the calibration set goes through a block in several batches. On a CPU fewer of them are faster, as
more stays in its caches, and take less memory."""

RECONSTRUCTION_BATCHES = 16
"""Batches that reconstruction wants at least: an eighth held out, the others in turn; fewer and larger ones cost more than they
gain."""


WEIGHTS_ROOM = 1.3
"""Bytes that have to be free for each byte of weights that are to stay: the rest is for the work of a block."""


def weights_place(offload: Offload, weights_bytes: int, *, device_free: int | None, cpu_free: int) -> Place:
    """Where the weights wait while others are worked on: on the device, in CPU memory or on disk.

    Args:
        device_free: bytes that are free on the accelerator; None without one.
        cpu_free: bytes that are free in CPU memory.
    """
    if offload == "disk":
        return "disk"
    if offload == "none" or (offload == "auto" and device_free is not None and WEIGHTS_ROOM * weights_bytes <= device_free):
        return "device"
    return "disk" if offload == "auto" and WEIGHTS_ROOM * weights_bytes > cpu_free else "cpu"


HIDDEN_SHARE = 0.25
"""Share of the free memory that hidden states may take between blocks: a batch of them is there as input and output, its
activations beside them, and a block of weights with what solving takes."""


def block_activation_bytes(sites: Sequence[Site], *, num_tokens: int, hidden_size: int, itemsize: int, need: Need) -> int:
    """Peak of one block's forward over T tokens beside its input: residual, the widest three intermediates at once
    (gate, up and their product), and the fp32 copy of the inputs a Gram matrix is summed from.
    """
    widest = max((max(site.shape) for site in sites if site.expert is None), default=0)
    widest = max(widest, max((2 * max(site.shape) for site in sites if site.expert is not None), default=0))
    live = num_tokens * itemsize * (3 * hidden_size + 3 * widest)
    if need == Need.GRAM and itemsize < 4:
        live += num_tokens * 4 * max((site.shape[1] for site in sites), default=0)
    return live


def paused_bytes(sites: Sequence[Site], *, num_tokens: int, hidden_size: int, itemsize: int) -> int:
    """What forwards over T tokens hold at most while all of them wait at one site of a block, T x itemsize x (3 H + the largest
    sum of O over the sites of one module): the block's input, the residual and the module's input, and what its sites before
    put out. Of a parameter's experts one is at work at a time.
    """
    widths: dict[str, int] = {}
    for site in sites:
        if site.expert in (None, 0):
            module = site.name.rsplit(".", 1 if site.expert is None else 2)[0]
            widths[module] = widths.get(module, 0) + site.shape[0]
    return num_tokens * itemsize * (3 * hidden_size + max(widths.values(), default=0))


def can_pause(
    sites: Sequence[Site],
    *,
    num_samples: int,
    batch_size: int,
    seq_len: int,
    hidden_size: int,
    itemsize: int,
    need: Need,
    free_bytes: int,
) -> bool:
    """Whether half of what is free has room for all batches while they wait at a site, and for the work on one or the site."""
    waiting = paused_bytes(sites, num_tokens=num_samples * seq_len, hidden_size=hidden_size, itemsize=itemsize)
    one = block_activation_bytes(
        sites, num_tokens=batch_size * seq_len, hidden_size=hidden_size, itemsize=itemsize, need=need
    )  # fmt: skip
    return waiting + max(one, solve_bytes(sites, need)) <= free_bytes // 2


def tuning_activation_bytes(sites: Sequence[Site], *, num_tokens: int, hidden_size: int, itemsize: int) -> int:
    """What a block's forward over T tokens keeps for its backward: input and output of every product, of two experts of
    each parameter, and as much again for the functions between them; the residual in fp32 beside its target.
    """
    seen: dict[tuple[int, str], int] = {}
    widths = 0
    for site in sites:
        key = (id(site.module), site.parameter)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 2:
            widths += sum(site.shape)
    return num_tokens * (2 * widths * itemsize + 3 * 4 * hidden_size)


def tuning_state_bytes(block_sites: Sequence[Site], itemsize: int) -> int:
    """What reconstruction holds of one block's sites: master copy, gradient, both Adam moments and the best weights so far
    in fp32, the weights of this step in their own dtype, and the support.
    """
    return sum(site.numel for site in block_sites) * (4 * 5 + itemsize + 1)


def solve_bytes(sites: Sequence[Site], need: Need) -> int:
    """Peak of pruning one site: fp32 copies of its weight (score, sorted copy, support), and for methods that hold the
    Gram matrix that matrix in fp32, and its factorisation: a third more than one fp64 matrix, and the factor in fp32.
    """
    if not sites:
        return 0
    work = max(site.numel for site in sites) * 4 * 4
    if need == Need.GRAM:
        work += max(site.shape[1] for site in sites) ** 2 * (4 + 8 * 4 // 3 + 4)
    return work


def refine_bytes(
    sites: Sequence[Site], *, num_layers: int, num_tokens: int, batch_tokens: int, itemsize: int, vocab_size: int
) -> int:
    """Peak of one pass of a mask's refinement beside the weights: inputs and output gradients of all its T tokens at the
    widest ``num_layers`` sites, what a batch's forward through the whole model keeps for its backward, its logits, fp32
    copies of one site's gradient and scores, and two flags a weight of all sites.
    """
    widths = sorted((sum(site.shape) for site in sites), reverse=True)
    held = num_tokens * itemsize * sum(widths[:num_layers])
    graph = batch_tokens * itemsize * 2 * sum(widths)
    logits = logits_bytes(num_tokens=batch_tokens, vocab_size=vocab_size, with_teacher=False)
    return held + graph + logits + max((site.numel for site in sites), default=0) * 4 * 4 + 2 * sum(s.numel for s in sites)


def logits_bytes(*, num_tokens: int, vocab_size: int, with_teacher: bool) -> int:
    """Peak of scoring T tokens: logits as they come and in fp32, log-probabilities; twice over for a divergence."""
    return num_tokens * vocab_size * 4 * (6 if with_teacher else 3)


def hidden_place(offload: Offload, hidden_bytes: int, *, device_free: int | None, cpu_free: int) -> Place:
    """Where hidden states lie between blocks: where ``offload`` says, or with ``auto`` at the nearest place of which they take
    no more than HIDDEN_SHARE.

    Args:
        offload: ``none``, ``cpu``, ``disk`` or ``auto``.
        hidden_bytes: of all batches; twice that where the dense model's are carried beside them.
        device_free: of the accelerator; None without one.
        cpu_free: beside the weights that are still to be read.
    """
    chosen: dict[str, Place] = {"none": "device", "cpu": "cpu", "disk": "disk"}
    if offload in chosen:
        return chosen[offload]
    if device_free is not None and hidden_bytes <= HIDDEN_SHARE * device_free:
        return "device"
    if hidden_bytes <= HIDDEN_SHARE * cpu_free:
        return "device" if device_free is None else "cpu"
    return "disk"


def choose_batch_size(
    sites: Sequence[Site],
    *,
    num_samples: int,
    seq_len: int,
    hidden_size: int,
    itemsize: int,
    need: Need,
    one_pass: bool,
    free_bytes: int,
    on_cpu: bool,
    tuned_sites: Sequence[Site] = (),
    hidden_here: bool = True,
) -> int:
    """Calibration sequences per forward: all of them where one pass is wanted and fits in half of what is free, on a CPU as
    many as its caches like; else as many as keep the block's activations below the hidden states of the calibration set.

    With ``tuned_sites``, those of the largest block that is to be reconstructed, there is room for its tuning too, and at
    least RECONSTRUCTION_BATCHES batches where there are as many sequences. Without ``hidden_here`` the hidden states wait in
    another memory than the one blocks compute in.
    """
    activations = block_activation_bytes(sites, num_tokens=seq_len, hidden_size=hidden_size, itemsize=itemsize, need=need)
    hidden = num_samples * seq_len * hidden_size * itemsize
    budget = free_bytes // 2 - 2 * hidden - solve_bytes(sites, need)
    tokens = CPU_STAGED_TOKENS if on_cpu else STAGED_TOKENS
    if one_pass and not tuned_sites and num_samples * activations <= budget:
        return max(1, min(num_samples, tokens // seq_len)) if on_cpu else num_samples
    if not hidden_here:  # a single batch is here all the same
        budget += 2 * hidden
    staged = max(1, min(num_samples, tokens // seq_len, hidden // activations, budget // activations))
    if not tuned_sites:
        return staged
    budget = free_bytes // 2 - 3 * hidden * hidden_here - tuning_state_bytes(tuned_sites, itemsize)
    kept = tuning_activation_bytes(tuned_sites, num_tokens=seq_len, hidden_size=hidden_size, itemsize=itemsize)
    return max(1, min(staged, num_samples // RECONSTRUCTION_BATCHES, budget // kept))
