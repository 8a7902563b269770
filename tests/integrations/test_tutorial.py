"""The commands of docs/tutorial.md run one after the other, cut short, and print lines of the form that it shows."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_smollm2
from page_blocks import blocks

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
SHORT = {
    "cera-train": "train.max_updates=2 train.eval_every=1 data.eval_rows=4",
    "cera-eval": "task.limit=4 task.max_new_tokens=16",
    "cera-export": "tolerance=10",
}
"""What a command gets besides, to take seconds."""
ANY_LINES = "..."
MAY_DIFFER = ("precision", "device", "speed")
"""Lines of which only the first word is compared: they depend on the machine."""


def steps() -> list[tuple[str, str]]:
    """Each command that is followed by its output, and that output."""
    found = []
    page = [block for block in blocks(TUTORIAL) if block.language != "python"]
    for block, after in itertools.pairwise(page):
        if block.language is None and after.language == "":
            found.append((" ".join(block.text.split()), after.text))
    return found


def forms(text: str) -> list[str]:
    """The lines of an output without numbers, names of layers and repetitions."""
    lines: list[str] = []
    for line in text.splitlines():
        words = line.split()
        words = words[:1] if words and words[0] in MAY_DIFFER else words
        form = re.sub(r"[+-]?\d[\d.,:]*", "#", " ".join(words)).replace("v_proj", "q_proj")
        lines += [form] * (lines[-1:] != [form])
    return lines


def has_form(printed: str, shown: str) -> bool:
    """Whether an output has the lines that the page shows, any others where that has `...`."""
    patterns = [r"(.*\n)*?" if form == ANY_LINES else re.escape(form) + r"\n" for form in forms(shown)]
    return re.fullmatch("".join(patterns), "\n".join(forms(printed)) + "\n") is not None


def shortened(command: str) -> str:
    command = command.replace("make quickstart", "cera-train +recipe=quickstart")  # what it runs, once all is installed
    for name, arguments in SHORT.items():
        command = re.sub(rf"\b{name}\b", f"{name} {arguments}", command)
    return command


@pytest.mark.slow
@needs_smollm2
def test_the_tutorial_prints_what_it_shows(tmp_path):
    """Its Python runs in test_docs.py, as that of every page."""
    commands = steps()
    assert len(commands) == 6
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, shown in commands:
        shell = ["bash", "-e", "-o", "pipefail", "-c", shortened(command)]
        done = subprocess.run(
            shell, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if "cera-chat" in command:
            assert len(done.stdout.split()) > 2  # what a model answers after two updates has no form
        else:
            assert has_form(done.stdout, shown), f"{command} printed\n{done.stdout}"
