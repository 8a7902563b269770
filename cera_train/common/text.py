"""How quantities read in the terminal and in reports."""

from __future__ import annotations

from typing import Any


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def gigabytes(size: float, decimals: int = 1) -> str:
    """Gigabytes of 10^9 bytes."""
    return f"{size / 1e9:,.{decimals}f} GB"


def targets(target_modules: Any) -> str:
    """`adapter.target_modules` in a line."""
    return target_modules if isinstance(target_modules, str) else " ".join(target_modules)
