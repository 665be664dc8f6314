"""Axes of a plot: where values lie between its edges, and which round values are marked. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_RATIO = 30.0
"""Positive values that differ by more than this factor are shown on a logarithmic scale."""
MARGIN = 0.06
"""Of the whole scale, left free at either end."""


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` mapped to 0..1, logarithmically where ``log``."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """One that shows all finite ``values``, with a margin."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        log = low > 0 and high / low > LOG_RATIO
        if log:
            spare = MARGIN * math.log(high / low)
            return cls(low * math.exp(-spare), high * math.exp(spare), log)
        spare = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
        floor = 0.0 if low >= 0 else -math.inf
        return cls(max(low - spare, floor), high + spare)

    def __call__(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """At most ``most`` round values between the ends, rising."""
        if self.log:
            return self._decades(most)
        step = _round_up((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)][: most + 1]

    def _decades(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


def _round_up(step: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(scale * power for scale in (1, 2, 5, 10) if scale * power >= step * (1 - 1e-9))
