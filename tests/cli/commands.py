"""Commands as processes, and the one line that a mistake gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def cera_train(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cera_train", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
        timeout=300,
    )


WITHOUT_TORCH = {"PYTHONPATH": f"{Path(__file__).parent / 'without_torch'}:{os.environ.get('PYTHONPATH', '')}"}
"""Importing torch fails: what still answers, answers before torch takes its seconds to import."""


def command(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / name), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
        timeout=300,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], program: str, message: str) -> None:
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{program}: ")
    assert re.search(message, line), line
