"""What CeRA, which stays beside the base, costs in decoding, by the rows of a batch."""

from __future__ import annotations

import statistics

from benchmarks.gpu.place import Place
from benchmarks.gpu.results import Found


def decoding(place: Place, model: str) -> Found:
    """New tokens a second of the base, or LoRA merged into it, and of CeRA."""
    from benchmarks import evaluation

    base = str(place.model(model))
    file = evaluation.word_problems(place.folder / "problems.jsonl")
    _, steps = evaluation.decoding(file, place.size.rounds, path=base, device=place.device)
    speeds = {
        name: {rows: rows / statistics.median(seconds) for rows, seconds in taken.items()}
        for name, taken in steps.items()
    }
    return Found(figures={"tokens_per_s": speeds})
