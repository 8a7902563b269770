"""How time and memory of an update grow: `make growth`.

Every point is measured in a process of its own, whose memory is the most it ever held: one update
as a warm-up, then the median of three more.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import WITHOUT_GPUS
from benchmarks.contestants import Adapter, Setting, our_run
from benchmarks.training import PACKAGE, logistic_maps
from cera_train.distributed.accelerator import peak_memory, quiet_libraries
from cera_train.model.batches import RowOrder, flat_batch

MICRO_BATCH_TOKENS = 4096
UPDATES = 3


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


POINTS = {
    "rank": [Point(kind, rank) for kind in ("cera", "lora") for rank in (16, 64, 128, 256, 512)],
    "length": [Point(length=2**power, sequences=1) for power in range(7, 13)],
    "sequences": [Point(sequences=2**power) for power in range(6)],
    "rows": [Point(rows=10**power) for power in (3, 4, 5)],
}
"""The field that grows -> its points."""


def measure(point: Point) -> tuple[float, int]:
    """Seconds of an update, and bytes of memory."""
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
    for update in range(UPDATES + 1):
        started = time.perf_counter()
        if point.rows is not None:
            groups = batches.passes(order.sequences(update), 1, 0, in_step=False)
            passes = [batches.load(group) for group, _ in groups]
        for batch in passes:
            (model.wrapped(batch).sum() / (point.length * point.sequences)).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]), peak_memory(model.accelerator.device)


def main() -> None:
    os.environ |= WITHOUT_GPUS
    for field, points in POINTS.items():
        print(f"\n{field:<12}{'adapter':<8}{'seconds':>10}{'GB':>8}")
        for point in points:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seconds, memory = process.submit(measure, point).result()
            value = getattr(point, field)
            print(f"{value:<12,}{point.kind:<8}{seconds:>10.2f}{memory / 1e9:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
