"""Sites: every prunable weight as a 2-D [out, in] view, and who feeds it.

O out, I in features, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from llmprune.spec import Pattern

_ROUTER = re.compile(r"(^|\.)\w*(router|gating)\w*(\.|$)")
_GATE = re.compile(r"(^|\.)(gate|shared_expert_gate)(\.|$)")  # a router where there are experts, else part of an MLP
_EXPERTS = re.compile(r"(^|\.)\w*experts?(\.|$)")
_NOT_MATRICES = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.modules.conv._ConvNd)
_NOT_A_MATRIX = re.compile(r"bias|A_log")
_EXPERT_COUNTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Site:
    """One prunable matrix: a Linear's weight, a transposed Conv1D's, or one expert of a fused 3-D parameter.

    Attributes:
        name: path of the module in the model; experts add the parameter's name and the expert's index.
        module: owner of the parameter.
        parameter: its name in the module.
        expert: index into the leading axis of a 3-D parameter, or None.
        num_experts: how many experts a flat 2-D parameter [E * rows, columns] holds one below the other, or None.
        transposed: the parameter stores [in, out].
        declared: the kind of module says it is a matrix; others are sites only if a product with them is observed.
    """

    name: str
    module: nn.Module
    parameter: str
    expert: int | None = None
    num_experts: int | None = None
    transposed: bool = False
    declared: bool = True

    @property
    def stored(self) -> Tensor:
        """The slice of the parameter as it lies in memory, 2-D."""
        whole: Tensor = getattr(self.module, self.parameter).detach()
        if self.num_experts is not None:
            whole = whole.unflatten(0, (self.num_experts, -1))
        return whole if self.expert is None else whole[self.expert]

    @property
    def weight_OI(self) -> Tensor:
        """A view [out, in]; writing to it writes to the model."""
        return self.stored.T if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.stored.numel()


def find_sites(block: nn.Module, path: str) -> list[Site]:
    """All matrices of a block that may multiply activations, in the order of definition; routers, norms, embeddings and
    convolutions are never sites.

    Works on ``meta`` weights. What a raw parameter is, and which way round, only a forward shows:
    :func:`llmprune.anatomy.watch.orient` settles it; until then ``declared`` sites are the likely ones.
    """
    sites = []
    has_experts = any(parameter.dim() == 3 for parameter in block.parameters()) or any(
        _EXPERTS.search(name) for name, _ in block.named_modules()
    )
    for name, module in block.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            local = ".".join(part for part in (name, "" if key == "weight" else key) if part)
            if parameter.dim() not in (2, 3) or never_pruned(local, module, has_experts=has_experts):
                continue
            sites += _sites_of(f"{path}.{local}", module, key, parameter)
    return sites


def _sites_of(name: str, module: nn.Module, key: str, parameter: Tensor) -> list[Site]:
    linear = isinstance(module, nn.Linear)
    transposed = type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))
    num_experts = next((getattr(module, count) for count in _EXPERT_COUNTS if hasattr(module, count)), None)
    experts = num_experts is not None or bool(_EXPERTS.search(name))
    declared = linear or transposed or (experts and parameter.dim() == 3)
    site = Site(name, module, key, transposed=transposed, declared=declared)
    if parameter.dim() == 3:
        return [replace(site, name=f"{name}.{index}", expert=index) for index in range(len(parameter))]
    if linear or transposed or not isinstance(num_experts, int) or parameter.shape[0] % num_experts:
        return [site]
    flat = replace(site, num_experts=num_experts, declared=True)
    return [replace(flat, name=f"{name}.{index}", expert=index) for index in range(num_experts)]


def never_pruned(local_name: str, owner: nn.Module, *, has_experts: bool) -> bool:
    """Whether a parameter of a block is no matrix (norm, embedding, convolution, bias, state-space decay) or a router."""
    if isinstance(owner, _NOT_MATRICES) or _NOT_A_MATRIX.search(local_name):
        return True
    return bool(_ROUTER.search(local_name) or (has_experts and _GATE.search(local_name)))


def select(sites: Iterable[Site], skip: Sequence[str]) -> list[Site]:
    """The sites whose names match none of the globs."""
    return [site for site in sites if not any(fnmatchcase(site.name, glob) for glob in skip)]


def total_weights(sites: Iterable[Site]) -> int:
    """Number of weights of all these sites."""
    return sum(site.numel for site in sites)


def check_pattern(sites: Iterable[Site], pattern: Pattern) -> None:
    """Raise PatternError, naming the site, where an n:m pattern does not divide the inputs."""
    for site in sites:
        pattern.check(site.shape[1], site.name)


def write_(site: Site, weight_OI: Tensor) -> int:
    """Store a pruned weight, zeros as +0.0, and return how many zeros it holds."""
    site.weight_OI.copy_(weight_OI + 0.0)  # -0.0 + 0.0 is +0.0
    return weight_OI.numel() - int(weight_OI.count_nonzero())
