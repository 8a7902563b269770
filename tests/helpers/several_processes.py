"""How torchrun starts runs in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
