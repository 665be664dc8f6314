"""Recovery: a pruned model trained back towards the dense one, its zeros and shapes kept.

Minimises ``distill`` * KL(teacher || student) + (1 - ``distill``) * cross-entropy over the next tokens (Hinton et al. 2015,
arXiv 1503.02531, at temperature 1; for pruned models Muralidharan et al. 2024, arXiv 2407.14679). Two ways to train:

- ``lora``: low-rank updates of the blocks' matrices, masked (:mod:`llmprune.engines.adapters`).
- ``full``: all parameters, in fp32; the gradient of a zero of a matrix is zero, and without weight decay Adam leaves it there.

Devices, mixed precision, accumulation and processes are accelerate's.

N sequences of one batch, S sequence, V vocabulary, R rows of logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, patch_environment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.engines.adapters import add_adapters_
from llmprune.errors import ConfigError, NonFiniteError, UnsupportedModel
from llmprune.processes import several
from llmprune.recovery_spec import RecoverConfig
from llmprune.report import RecoveryPoint

Teacher = Callable[[Tensor], Tensor]
"""``teacher(ids_NS)``: the dense model's logits [N, S, V]."""

NUM_CHECKS = 20
"""How often the held-out loss is measured."""
WARM_UP = 0.05
"""Share of the steps in which the rate rises."""
MAX_NORM = 1.0
"""Gradients longer than this are shortened to it."""
_LOSS_BUDGET = 1 << 25
"""Logits of which a loss is taken at once, in elements."""


@dataclass(frozen=True)
class Trained:
    """What a training did: the held-out losses, how many numbers were trained, whether the weights stayed as they were, and
    the matrices that it could not train.
    """

    points: tuple[RecoveryPoint, ...]
    num_trained: int
    rolled_back: bool
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Training:
    """A model made ready: what is called, what is trained, and how it becomes the plain model again."""

    module: nn.Module
    parameters: list[nn.Parameter]
    matrices: list[nn.Parameter]  # those of them whose zeros stay; low-rank updates begin with zeros that do not
    finish: Callable[[], object]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Zeros:
    """Where the zeros of a model's matrices are, one bit a weight."""

    bits: dict[str, np.ndarray[Any, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> Zeros:
        """Of all parameters that are matrices, or stacks of them, and hold any."""
        found = {name: _zero_bits(parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return cls({name: bits for name, bits in found.items() if bits.any()})

    def check(self, model: nn.Module) -> None:
        """Assert that every zero is one still; so every n:m pattern is kept too."""
        parameters = dict(model.named_parameters())
        for name, bits in self.bits.items():
            assert not np.any(bits & ~_zero_bits(parameters[name])), f"{name} lost zeros"


def make_accelerator(device: torch.device, dtype: torch.dtype, config: RecoverConfig) -> Accelerator:
    """Accelerate on ``device``, or under ``accelerate launch`` on each process's own.

    Args:
        dtype: of the weights as they are stored. ``full`` trains in fp32 and computes in this one; ``lora`` computes with the
            weights as they are, and fp16 has its loss scaled.
    """
    distributed = several()
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    if device.type == "cpu" and precision == "fp16":  # accelerate has no CPU kernels for it
        precision = "no"
    if config.mode == "lora" and precision == "bf16":
        precision = "no"
    # Its state is the process's; another run may want another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    with patch_environment(**({} if distributed else {"accelerate_torch_device": str(device)})):
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )


def recover_(
    model: PreTrainedModel,
    stack: Stack,
    train_NS: Tensor,
    held_out_NS: Tensor,
    teacher: Teacher | None,
    config: RecoverConfig,
    accelerator: Accelerator,
) -> Generator[RecoveryPoint | int, None, Trained]:
    """Train in place; yields a point where the held-out loss is measured, and the number of every step done.

    In the end the model holds, in the dtypes it came with, the weights of the lowest held-out loss; where none was below that
    of the start, the weights it came with. Every zero of a matrix is one still.

    Args:
        model: on the accelerator's device.
        stack: its blocks, probed.
        train_NS, held_out_NS: token ids on the CPU.
        teacher: None trains on the text alone.

    Raises:
        ConfigError: the loss is not finite any more.
        NonFiniteError: it is not from the start.
        UnsupportedModel: the blocks have no matrix to train.
    """
    if not any(stack.sites):
        raise UnsupportedModel(f"nothing to train: no block of {stack.path} has a matrix.")
    zeros = Zeros.of(model)
    training = _lora(model, stack, config) if config.mode == "lora" else _full(model)
    objective = _Objective(teacher, config.distill if teacher else 0.0, accelerator.device)
    with recomputed(stack, accelerator.device):
        points, best = yield from _train(training, objective, train_NS, held_out_NS, config, accelerator)
    _put_back_(training.parameters, best)
    training.finish()
    model.eval().requires_grad_(False)
    zeros.check(model)
    num_trained = sum(parameter.numel() for parameter in training.parameters)
    lowest = min(point.loss for point in points)
    return Trained(tuple(points), num_trained, not lowest < points[0].loss, training.left_out)


def _train(
    training: _Training,
    objective: _Objective,
    train_NS: Tensor,
    held_out_NS: Tensor,
    config: RecoverConfig,
    accelerator: Accelerator,
) -> Generator[RecoveryPoint | int, None, tuple[list[RecoveryPoint], list[Tensor]]]:
    """All steps; returns the points, and the trained numbers of the lowest one."""
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(training.parameters, lr=config.learning_rate, weight_decay=0.0)
    module, optimizer = accelerator.prepare(training.module, optimizer)
    batches = _batches(train_NS, config, accelerator)
    loss = objective.mean(module, held_out_NS, config.batch_size)
    if not math.isfinite(loss):
        raise NonFiniteError(f"{config.model} puts out NaN or inf before any training. Prune it again, or use --dtype float32.")
    points = [RecoveryPoint(step=0, loss=loss, loss_train=None, seconds=0.0)]
    yield points[0]
    best, lowest, seen = _copies(training.parameters), loss, []
    every = -(-config.steps // NUM_CHECKS)
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        for _ in range(config.accumulate):
            with accelerator.accumulate(module):
                batch_loss = objective(module, next(batches))
                seen.append(_finite(float(batch_loss.detach()), step, config))
                accelerator.backward(batch_loss)
                if accelerator.sync_gradients:
                    _mask_gradients_(training.matrices)
                    accelerator.clip_grad_norm_(training.parameters, MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
        if step % every == 0 or step == config.steps:
            loss = _finite(objective.mean(module, held_out_NS, config.batch_size), step, config)
            if loss < lowest:
                lowest, best = loss, _copies(training.parameters)
            seconds = time.perf_counter() - begun
            points.append(RecoveryPoint(step=step, loss=loss, loss_train=sum(seen) / len(seen), seconds=seconds))
            seen.clear()
            yield points[-1]
        yield step
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return points, best


def _lora(model: PreTrainedModel, stack: Stack, config: RecoverConfig) -> _Training:
    """Masked low-rank updates of the blocks' matrices."""
    sites = [site for sites in stack.sites for site in sites]
    tuner, shared = add_adapters_(model, sites, rank=config.rank, seed=config.seed)
    parameters = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
    return _Training(tuner, parameters, [], tuner.merge_and_unload, tuple(shared))


def _full(model: PreTrainedModel) -> _Training:
    """All parameters, held in fp32 until the end."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtypes = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    def cast_back() -> None:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None

    return _Training(model, parameters, [parameter for parameter in parameters if parameter.dim() > 1], cast_back)


@contextmanager
def recomputed(stack: Stack, device: torch.device) -> Iterator[None]:
    """Have the blocks compute their activations again in the backward, where memory is an accelerator's: only what goes from
    block to block is kept.
    """
    blocks = () if device.type == "cpu" else stack.blocks
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True)
class _Objective:
    """The loss of a batch: mean over the next tokens, fp32."""

    teacher: Teacher | None
    distill: float
    device: torch.device

    def __call__(self, module: nn.Module, ids_NS: Tensor) -> Tensor:
        ids_NS = ids_NS.to(self.device)
        logits_RV: Tensor = module(input_ids=ids_NS, use_cache=False).logits[:, :-1].flatten(0, 1)
        teacher_RV = None
        if self.teacher is not None and self.distill:
            with torch.no_grad():
                teacher_RV = self.teacher(ids_NS)[:, :-1].flatten(0, 1).to(logits_RV.device)
        targets_R = ids_NS[:, 1:].flatten().to(logits_RV.device)
        total: Tensor = logits_RV.new_zeros((), dtype=torch.float32)
        rows = max(1, _LOSS_BUDGET // logits_RV.shape[1])
        for start in range(0, len(targets_R), rows):
            part = slice(start, start + rows)
            chunk = (logits_RV[part], None if teacher_RV is None else teacher_RV[part], targets_R[part])
            if len(targets_R) > rows:  # the fp32 copies of one part at a time
                total = total + checkpoint(self._sum, *chunk, use_reentrant=False)
            else:
                total = total + self._sum(*chunk)
        return total / len(targets_R)

    def _sum(self, logits_RV: Tensor, teacher_RV: Tensor | None, targets_R: Tensor) -> Tensor:
        log_q_RV = F.log_softmax(logits_RV.float(), dim=-1)
        loss = log_q_RV.new_zeros(())
        if teacher_RV is not None:
            log_p_RV = F.log_softmax(teacher_RV.float(), dim=-1)
            loss = loss + self.distill * F.kl_div(log_q_RV, log_p_RV, log_target=True, reduction="sum")
        if self.distill < 1:
            loss = loss + (1 - self.distill) * F.nll_loss(log_q_RV, targets_R, reduction="sum")
        return loss

    @torch.no_grad()
    def mean(self, module: nn.Module, ids_NS: Tensor, batch_size: int) -> float:
        """Over all sequences."""
        total = sum(float(self(module, batch_NS)) * len(batch_NS) for batch_NS in ids_NS.split(batch_size))
        return total / len(ids_NS)


def _batches(train_NS: Tensor, config: RecoverConfig, accelerator: Accelerator) -> Iterator[Tensor]:
    """Batches without end, in an order drawn anew each time round; every process takes its part of the same order."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    width = config.batch_size * accelerator.num_processes
    own = slice(accelerator.process_index * config.batch_size, (accelerator.process_index + 1) * config.batch_size)
    while True:
        while len(order) < width:
            order += torch.randperm(len(train_NS), generator=generator).tolist()
        yield train_NS[order[:width][own]]
        del order[:width]


def _schedule(step: int, steps: int) -> float:
    """The share of the highest rate in a step, counted from one: a linear rise, then half a cosine that ends near zero."""
    rise = max(1, round(WARM_UP * steps))
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1))) / 2


@torch.no_grad()
def _mask_gradients_(matrices: Sequence[nn.Parameter]) -> None:
    """No gradient for zeros."""
    for matrix in matrices:
        if matrix.grad is not None:
            matrix.grad.masked_fill_(matrix == 0, 0.0)


def _finite(loss: float, step: int, config: RecoverConfig) -> float:
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is not finite any more in step {step}, at --lr {config.learning_rate:g}. Lower --lr.")
    return loss


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


@torch.no_grad()
def _put_back_(parameters: Sequence[nn.Parameter], copies: Sequence[Tensor]) -> None:
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.copy_(copy)


def _zero_bits(parameter: Tensor) -> np.ndarray[Any, Any]:
    return np.packbits((parameter.detach() == 0).cpu().numpy())
