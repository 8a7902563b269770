"""Commands as processes."""

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_TORCH = {
    "PYTHONPATH": f"{Path(__file__).parent / 'without_torch'}:{os.environ.get('PYTHONPATH', '')}"
}
"""Importing torch fails: what still answers, answers before torch takes its seconds to import."""


def command(
    name: str, *arguments: str, cwd: Path | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A program of this environment, or any other by its path."""
    program = str(Path(sys.executable).parent / name)
    settings = {"capture_output": True, "text": True, "check": False, "timeout": 900}
    return subprocess.run([program, *arguments], cwd=cwd, env=os.environ | environment, **settings)


def python(*arguments: object, cwd: Path | None = None, **environment: str) -> str:
    """What Python prints with these arguments; it must end well."""
    done = command(sys.executable, *map(str, arguments), cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
