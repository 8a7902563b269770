"""Commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
