"""How time and memory of an update grow: `python -m benchmarks.growth --help`. `make pictures`
draws what it writes.

Every point is measured in a process of its own, whose memory is the most it ever held: one update
as a warm-up, then the median of some more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.circumstances import circumstances
from benchmarks.contestants import Adapter, Setting, our_run
from benchmarks.diagrams import GROWTH
from benchmarks.training import PACKAGE, WITHOUT_GPUS, logistic_maps

MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """One update of `sequences` sequences of `length` tokens, two thirds of them supervised, in
    bf16."""

    kind: str = "cera"
    rank: int = 64
    length: int = 256
    sequences: int = 8
    rows: int | None = None
    """Rows of the data set that the update takes its rows from, read as training reads them; None
    for rows at hand."""


START = Point()
CURVES: dict[str, tuple[str, list[int], list[str]]] = {
    "rank": ("rank", [16, 64, 128, 256, 512], ["cera", "lora"]),
    "sequence length": ("length", [128, 256, 512, 1024, 2048, 4096], ["cera"]),
    "sequences": ("sequences", [1, 2, 4, 8, 16, 32], ["cera"]),
    "rows of the data set": ("rows", [1_000, 10_000, 100_000], ["cera"]),
}
"""What grows -> the field of a point, its values, the adapters."""


def measure(point: Point, updates: int, pipe: Any) -> None:
    """A point's process."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    from cera_train.distributed.accelerator import peak_memory, quiet_libraries
    from cera_train.model.batches import RowOrder, flat_batch

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = itertools.islice(itertools.cycle(logistic_maps()), point.rows or 20)
        file.write_text("".join(f"{row}\n" for row in rows))
        adapter = Adapter(point.rank, alpha=point.rank)
        setting = Setting(PACKAGE, file, [], "bfloat16", torch.device("cpu"), adapter)
        data, model, _ = our_run(setting, point.kind, micro_batch_tokens=MICRO_BATCH_TOKENS)
    batches = model.micro_batches(data.rows.train)
    order = RowOrder(len(data.rows.train), point.sequences, seed=0)
    if point.rows is None:
        numbers = random.Random(0)
        ids = [numbers.randrange(1000) for _ in range(point.length)]
        mask = [place > point.length // 3 for place in range(point.length)]
        together = max(1, min(point.sequences, MICRO_BATCH_TOKENS // point.length))
        passes = [flat_batch([ids] * together, [mask] * together)] * (point.sequences // together)

    taken = []
    for update in range(updates + 1):
        started = time.perf_counter()
        if point.rows is not None:
            groups = batches.passes(order.sequences(update), 1, 0, in_step=False)
            passes = [batches.load(group) for group, _ in groups]
        for batch in passes:
            (model.wrapped(batch).sum() / (point.length * point.sequences)).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
        taken.append(time.perf_counter() - started)
    seconds = round(statistics.median(taken[1:]), 4)
    pipe.send({"seconds": seconds, "memory": peak_memory(model.accelerator.device)})


def measure_alone(point: Point, updates: int) -> dict[str, float]:
    """Measures a point in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(point, updates, theirs))
    process.start()
    theirs.close()  # so that it ends with its process
    result = ours.recv()
    process.join()
    return result


def main() -> None:
    os.environ |= WITHOUT_GPUS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument(
        "--curves", nargs="+", default=list(CURVES), choices=CURVES, metavar="CURVE"
    )
    parser.add_argument("--points", type=int, help="the first of each curve; by default all")
    parser.add_argument("--output", type=Path, default=GROWTH)
    arguments = parser.parse_args()
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.curves:
        field, values, kinds = CURVES[name]
        curves[name] = []
        print(f"\n{name:<24}{'':<8}{'seconds':>10}{'GB':>8}")
        for kind in kinds:
            for value in values[: arguments.points]:
                point = replace(START, kind=kind, **{field: value})
                if field == "length":  # one sequence, so that its length alone grows
                    point = replace(point, sequences=1)
                result = measure_alone(point, arguments.updates)
                figures = f"{result['seconds']:>10.2f}{result['memory'] / 1e9:>8.2f}"
                print(f"{value:<24,}{kind:<8}{figures}", flush=True)
                curves[name].append({"kind": kind, "value": value} | result)
    measured = circumstances() | {"threads": torch.get_num_threads(), "curves": curves}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
