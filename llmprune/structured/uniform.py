"""The same widths in every layer: which of them meet a budget, so that a config of the stock class can say them.

The FFN makes up for what attention cannot: kv groups are few, and some configs take only numbers of heads that divide the
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.structured.budget import Budget, Sized
from llmprune.structured.levels import budget_of, quantum_of

UNIFORM_CHANNELS = 64
"""FFN widths are multiples of so many, where the width allows: what kernels and tensor parallelism divide evenly."""


@dataclass(frozen=True)
class Widths:
    """What is left of every layer.

    Attributes:
        kv_groups: of every attention; None where no attention is pruned.
        channels: of every FFN; None where no FFN is pruned.
    """

    kv_groups: int | None
    channels: int | None

    def removed(self, modules: Sequence[Sized]) -> list[int]:
        """Groups that go from each module."""
        return [module.num_groups - self.kept(module) for module in modules]

    def kept(self, module: Sized) -> int:
        """Groups left of a module."""
        count = self.kv_groups if module.kind == "attention" else self.channels
        assert count is not None
        return count


def uniform_widths(budget: Budget, kv_counts: Sequence[int]) -> list[Widths]:
    """All pairs of kv groups and channels that meet the budget, each as closely from above as its FFN can: none removes less,
    and of those in which attention alone is enough only the one that removes the least.

    A multiple of 64 channels is left, of the largest smaller power of two where 64 does not divide the width or is more than an
    eighth of it. Where kinds have budgets of their own, attention gives the most groups within its own and the FFN the rest of
    the parameters of both: one pair. Without an FFN the rest stays, where some groups go.

    Args:
        kv_counts: kv groups that the config takes (:func:`llmprune.structured.widths.uniform_counts`).

    Raises:
        UnsupportedModel: layers differ before any are pruned.
        ConfigError: with at least a kv group and a quantum of channels left, less goes than is asked.
    """
    modules = budget.modules
    attention = [index for index, module in enumerate(modules) if module.kind == "attention"]
    ffn = [index for index, module in enumerate(modules) if module.kind == "ffn"]
    for indices in (attention, ffn):
        odd = next((index for index in indices if modules[index].num_groups != modules[indices[0]].num_groups), None)
        if odd is not None:
            raise UnsupportedModel(
                f"{modules[odd].name} has {modules[odd].num_groups} groups and {modules[indices[0]].name} "
                f"{modules[indices[0]].num_groups}: they cannot be given the same width. Use --widths free."
            )
    shared = budget if budget.shared else Budget.of(modules, budget.sparsity, "parameters")
    heads = modules[attention[0]].num_groups if attention else 0
    counts = sorted(count for count in kv_counts if 0 < count <= heads) if attention else [0]
    if attention and not budget.shared:
        most = budget_of([modules[index] for index in attention], budget.sparsity) // len(attention)
        counts = [next(count for count in [*counts, heads] if count >= heads - most)]
    width = modules[ffn[0]].num_groups if ffn else 0
    quantum = quantum_of([modules[index] for index in ffn], UNIFORM_CHANNELS) if ffn else 1
    per_group = sum(shared.units[index] for index in attention)
    per_channel = sum(shared.units[index] for index in ffn)
    found: list[Widths] = []
    for count in counts:
        rest = max(shared.target - (heads - count) * per_group, 0) if ffn or budget.shared or count == heads else 0
        if rest and not per_channel:
            continue
        channels = (width - (-(-rest // per_channel) if rest else 0)) // quantum * quantum
        if ffn and channels < quantum:
            continue
        if not rest:  # counts rise: this one removes less than those before it that are enough by themselves
            found = [other for other in found if other.channels not in (width, None)]
        found.append(Widths(count if attention else None, channels if ffn else None))
    if not found:
        most_units = (heads - min(counts)) * per_group + (width - quantum if ffn else 0) * per_channel
        total = heads * per_group + width * per_channel
        left = [f"{min(counts)} kv groups"] * bool(attention) + [f"{quantum} channels"] * bool(ffn)
        raise ConfigError(
            f"a share of {budget.sparsity:g} cannot go with the same widths in every layer: {most_units / total:.3g} is the "
            f"most, with {' and '.join(left)} left. Choose another --sparsity, or use --widths free."
        )
    return found


def closest(widths: Sequence[Widths], modules: Sequence[Sized], sparsity: float) -> Widths:
    """Of several widths those whose kv groups are nearest to the share that is to go: what is taken without a search."""
    heads = next((module.num_groups for module in modules if module.kind == "attention"), 0)
    return min(widths, key=lambda one: abs(heads * (1 - sparsity) - (one.kv_groups or 0)))


def shortfall(widths: Widths, modules: Sequence[Sized], sparsity: float) -> str | None:
    """What to tell where attention loses less than the share that is asked of it and the FFN more; else None."""
    attention = next((module for module in modules if module.kind == "attention"), None)
    if attention is None or widths.kv_groups is None or widths.kv_groups <= (1 - sparsity) * attention.num_groups:
        return None
    ffn = next((module for module in modules if module.kind == "ffn"), None)
    rest = "" if ffn is None else f"; the FFN makes up for it with {widths.channels} of {ffn.num_groups} channels left"
    return (
        f"attention keeps {widths.kv_groups} of {attention.num_groups} kv groups, more than {1 - sparsity:.4g} of them{rest}."
    )
