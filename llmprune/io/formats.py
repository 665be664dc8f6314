"""Numbers as readers want them: shares, ratios, sizes, times. Torch-free."""

from __future__ import annotations

import math

from llmprune.task_report import TaskScore

NOTHING = "\N{EN DASH}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.5 as ``50.00 %``."""
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"


def target_percent(fraction: float) -> str:
    """A sparsity as it was asked for, without trailing zeros: 0.625 as ``62.5 %``."""
    return f"{100 * fraction:.10g} %"


def number(value: float | None, digits: int = 2) -> str:
    """A float with fixed digits; ``not finite`` for inf and NaN, powers of ten from 100,000 on."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:,.{digits}f}"


def times(ratio: float | None) -> str:
    """1.0512 as ``1.05x``."""
    return number(ratio) + ("x" if ratio is not None and math.isfinite(ratio) else "")


def small(value: float | None) -> str:
    """Three significant digits: 0.01234 as ``0.0123``."""
    if value is None or not math.isfinite(value):
        return number(value)
    return "0" if value == 0 else f"{value:#.3g}" if 1e-4 <= abs(value) < 100 else f"{value:.2e}"


def rate(value: float) -> str:
    """Tokens per second; tenths only below a thousand."""
    return number(value, 0 if value >= 1000 else 1)


def brief(seconds: float) -> str:
    """A short time in three digits: ``12.3 µs``, ``4.56 ms``, ``1.20 s``."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e-3, "µs"), (1.0, "ms")) if seconds < scale), (1e3, "s"))
    amount = seconds / scale * 1e3
    digits = 2 if amount < 10 else 1 if amount < 100 else 0
    return f"{amount:,.{digits}f} {unit}"


def count(value: int) -> str:
    """An integer with thousands separators."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds as ``4.2 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: int | None) -> str:
    """Bytes with a binary unit: ``1.19 GiB``."""
    if num_bytes is None:
        return NOTHING
    amount, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while amount >= 1024 and unit != "TiB":
        amount, unit = amount / 1024, next(units)
    return f"{num_bytes} B" if unit == "B" else f"{amount:.2f} {unit}"


def with_error(value: float | None, stderr: float | None) -> str:
    """A score with its standard error: ``0.4512 ± 0.0050``."""
    if value is None or stderr is None or not math.isfinite(stderr):
        return number(value, 4)
    return f"{number(value, 4)} ± {number(stderr, 4)}"


def change_of(score: TaskScore) -> str:
    """Pruned minus dense; ``~`` marks a change within two standard errors."""
    if score.change is None or not math.isfinite(score.change):
        return number(score.change)
    return f"{'~' if score.is_clear is False else ''}{score.change:+.4f}"
