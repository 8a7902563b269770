"""Cells of a page: whether a check of a subject, such as a method or a type of models, holds. They
are kept in a file as they come: the same command goes on after an interruption."""

import contextlib
import io
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import write_result
from cera_train.common.errors import UserError
from cera_train.settings.run import Config
from cera_train.training.train import train

ROOT = Path(__file__).parents[1]
YES = "yes"

Cells = dict[str, dict[str, str]]
"""Subject -> check -> cell."""


class Mismatch(Exception):
    """What a check has found, in a few words."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Mismatch(otherwise)


def check_close(
    actual: Any,
    expected: Any,
    what: str = "loss or gradients",
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> None:
    """Of tensors, or lists of them: |actual - expected| <= atol + rtol |expected|."""
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise Mismatch(f"other {what}") from error


def cell(check: Callable[..., str | None], *subject: Any) -> str:
    """What a check returns, else yes, or why it failed: whatever it raises is an answer."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return check(*subject) or YES
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    """An error in one line, without the settings that it is about."""
    value = r"(=(\{.*?\}|\S+?))?"
    place = rf"^(adapter\.(method|kind)=\S+?|model\.path=\S+)?( ?adapter\.settings\.\w+{value})*"
    words = re.sub(rf"{place}:? (?=\S)", "", " ".join(str(error).split()))
    is_plain = isinstance(error, UserError | Mismatch)
    return words if is_plain else f"{type(error).__name__}: {words}"


def in_short(words: str, width: int) -> str:
    """What is so, without how to fix it."""
    sentence = re.split(r"\. |[:.,] (?:[Cc]hoose|[Ss]et|Leave|save) ", words)[0].rstrip(".")
    return textwrap.shorten(sentence, width, placeholder=" ...").replace("|", "/")


def fill(
    file: Path, subjects: Iterable[str], checks: Sequence[str], cell: Callable[[str, str], str]
) -> Cells:
    """The cells of all subjects, by `cell(subject, check)` where the file has none. Where the first
    check fails there are no others."""
    found = json.loads(file.read_text()) if file.exists() else {}
    for subject in subjects:
        row = found.setdefault(subject, {})
        for check in checks:
            if row.get(checks[0], YES) == YES and check not in row:
                row[check] = cell(subject, check)
                write_result(file, found)
        print(subject, row, flush=True)
    return {subject: found[subject] for subject in subjects}


def meanings(checks: Mapping[str, Callable]) -> str:
    """The checks of a page, by their docstrings."""
    return "\n".join(
        f"- **{name}**: {' '.join(check.__doc__.split())}" for name, check in checks.items()
    )


def table(rows: Mapping[str, Sequence[str]]) -> str:
    """Subject -> its cells, as rows of Markdown: subjects that are alike share one, and the largest
    group is first."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for subject, row in rows.items():
        alike.setdefault(tuple(row), []).append(subject)
    by_size = sorted(alike.items(), key=lambda group: -len(group[1]))
    return "\n".join(f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in by_size)


def check_resume(run: Path, config: Config) -> None:
    """Goes on with a copy of a finished run of four updates from its checkpoint of the second."""
    cut = run.with_name(config.name)
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(run, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "4")
    train(config)
    for path in sorted((run / "adapter").glob("*.safetensors")):
        is_same = path.read_bytes() == (cut / "adapter" / path.name).read_bytes()
        require(is_same, f"{path.name} differs")
