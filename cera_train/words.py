"""How quantities read in the terminal and in reports. Nothing here imports torch."""

from __future__ import annotations

import re
from typing import Any

STEERS_A_DISPLAY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, such as the start of a terminal's escape sequence; marks that reorder the letters after them; and
halves of a surrogate pair, which no file and no terminal takes."""


def clean(text: str) -> str:
    """What a model, a data file or a stranger's run says, as characters that are only shown."""
    return STEERS_A_DISPLAY.sub("\N{REPLACEMENT CHARACTER}", text.expandtabs(4))


def say(label: str, text: str) -> None:
    """One aligned line."""
    print(f"{label:<11}{clean(text)}", flush=True)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def gigabytes(size: float, decimals: int = 1) -> str:
    """Of 10^9 bytes."""
    return f"{size / 1e9:,.{decimals}f} GB"


def targets(target_modules: Any) -> str:
    """What `adapter.target_modules` names."""
    return target_modules if isinstance(target_modules, str) else " ".join(target_modules)
