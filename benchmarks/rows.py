"""Rows of JSON lines, results in JSON, and the losses of rows by transformers alone."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cera_train.verdicts.verdict import holm

WORDS = "the of and to in is that for it as with on by at from this have not are but".split()  # noqa: SIM905
"""One token each of SmolLM2's tokenizer."""


def read_rows(file: Path) -> list[Any]:
    """Lines end with \\n alone: `splitlines` also splits at characters that may stand in a JSON
    string."""
    return [json.loads(line) for line in file.read_text().rstrip("\n").split("\n")]


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_result(file: Path, result: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def with_holm(contrasts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contrasts, each with its p-value after Holm over them."""
    p_values = holm([each["p_value"] for each in contrasts])
    return [each | {"p_holm": p} for each, p in zip(contrasts, p_values, strict=True)]


def random_rows(
    count: int,
    tokens: int,
    columns: tuple[str, str] = ("prompt", "completion"),
    prompt: float = 0.4,
    spread: float = 0.4,
) -> list[dict[str, str]]:
    """Rows of random words.

    Args:
        tokens: of a row, on average.
        columns: of the prompt and of the completion.
        prompt: its share of the tokens.
        spread: the standard deviation of a row's tokens, as a share.
    """
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        length = max(8, round(draw.gauss(tokens, spread * tokens)))
        asked = max(1, round(prompt * length))
        words = draw.choices(WORDS, k=length)
        texts = (" ".join(words[:asked]), "".join(f" {word}" for word in words[asked:]))
        rows.append(dict(zip(columns, texts, strict=True)))
    return rows


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@torch.no_grad()
def completion_losses(model: nn.Module, ids: list[int], prompt: int) -> torch.Tensor:
    """The losses of all tokens but the first `prompt`."""
    tokens = torch.tensor(ids, device=next(model.parameters()).device)
    completed = tokens[prompt:]
    logits = model(tokens[None], use_cache=False, logits_to_keep=len(completed) + 1).logits
    return nn.functional.cross_entropy(logits[0, :-1].float(), completed, reduction="none")
