"""The race of benchmarks.training, a contestant a piece, so that one that fails or is not installed stops no other."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu.place import Place
from benchmarks.gpu.results import SKIPPED, Found
from benchmarks.training import WORKS, race, useful_flops

RACERS = {
    "cera": "ours with CeRA",
    "cera_compiled": "ours with CeRA, compiled",
    "lora": "ours with LoRA",
    "trl": "TRL + LoRA, best",
    "unsloth": "unsloth + LoRA",
}
"""Contestants by what they are called in the names of pieces."""

HELD_OUT = 1
"""Rows that a run of ours evaluates on."""


def lap(place: Place, contestant: str, model: str, precision: str) -> Found:
    """Updates of one contestant, on the rows that all of them get."""
    from transformers import AutoConfig

    from benchmarks.contestants import CONTESTANTS

    package = CONTESTANTS[contestant].PATCHES
    if package is not None and importlib.util.find_spec(package) is None:
        return Found(SKIPPED, f"{package} is not installed")
    size = place.size
    work = replace(WORKS[f"{model}, {precision}"], device=place.device)
    if place.size_name == "tiny":
        work = replace(work, sequences=4)
    file = place.rows("race", (size.rounds + 1) * work.sequences + HELD_OUT, size.row_tokens, ("question", "answer"))
    base = str(place.model(model))
    config = AutoConfig.from_pretrained(base)
    flops, tokens, supervised = useful_flops(place.tokenizer, config, file, work.sequences, size.rounds)
    found = race([contestant], work, base, file, supervised)
    seconds = found["seconds"][contestant]
    return Found(
        figures={
            "update_seconds": statistics.median(seconds),
            "tokens_per_s": median_rate(tokens, seconds),
            "supervised_tokens_per_s": median_rate(supervised, seconds),
            "useful_flops": median_rate(flops, seconds),
            "peak_memory_bytes": found["peak_memory_bytes"][contestant],
            "seconds": seconds,
        }
    )


def median_rate(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """The median over rounds: one slow round counts no more than in the median of the seconds."""
    return statistics.median(amount / taken for amount, taken in zip(amounts, seconds, strict=True))
