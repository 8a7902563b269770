"""cera-train: fine-tune language models with CeRA, a non-linear low-rank adapter, against LoRA and
DoRA.

Importing this package registers CeRA with PEFT, so that `PeftModel.from_pretrained` loads CeRA
adapters. The commands do so later, where they load torch: their `--help`, mistakes and tables
answer without those two seconds.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is one of our commands: `cera-train`, `python -m cera_train` (whose name
    is -m until the package is imported), or a process that one of them spawned."""
    program = Path(sys.argv[0] if sys.argv else "")
    is_script = program.name.startswith("cera-") and program.suffix in ("", ".exe")
    return is_script or program.name == "-m" or program.parent == Path(__file__).parent


def _is_grader() -> bool:
    """Whether this is a process of evaluation/grading.py, which answers no one who could load an
    adapter."""
    multiprocessing = sys.modules.get("multiprocessing")
    return (
        multiprocessing is not None
        and multiprocessing.current_process().name == "pebble_pool_worker"
    )


if not (_is_command() or _is_grader()):
    import cera_train.cera  # noqa: F401
