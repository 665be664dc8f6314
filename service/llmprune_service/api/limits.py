"""How often a tenant may submit."""

from __future__ import annotations

import math
import time

from llmprune_service.problems import Problem


class TokenBuckets:
    """A bucket a tenant: full it holds a minute's worth, and it fills as fast as it may be emptied."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, tenant: str) -> None:
        """Take one; raises Problem 429 with the seconds until there is one again."""
        moment = time.monotonic()
        level, then = self._buckets.get(tenant, (float(self._per_minute), moment))
        level = min(self._per_minute, level + (moment - then) * self._per_minute / 60)
        if level < 1:
            seconds = math.ceil((1 - level) * 60 / self._per_minute)
            raise Problem(
                429, "too-many-submissions", f"At most {self._per_minute} submissions a minute. Wait {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )  # fmt: skip
        self._buckets[tenant] = level - 1, moment
