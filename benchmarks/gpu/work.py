"""A piece's process: `python -m benchmarks.gpu.work PIECE DEVICE SIZE OUTPUT FOUND PARENT` writes what it found as
JSON. PARENT is the process that it ends with."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"

DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def main() -> None:
    name, device, size, output, file, parent = sys.argv[1:]
    if sys.platform == "linux":  # else a killed command would leave a piece on the GPU
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was killed before
        sys.exit(1)
    from benchmarks.gpu.pieces import all_pieces
    from benchmarks.gpu.place import Place

    found = all_pieces()[name].work(Place(device, size, Path(output)))
    Path(file).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
