"""What CeRA, which stays beside the base, costs in decoding, by the rows of a batch."""

from __future__ import annotations

from benchmarks.gpu.place import Place
from benchmarks.gpu.results import Found


def decoding(place: Place, model: str) -> Found:
    """New tokens a second of the base, or LoRA merged into it, and of CeRA."""
    from benchmarks.evaluation import adapter_cost, word_problems

    file = word_problems(place.folder / "rows" / "problems.jsonl")
    speeds = adapter_cost(file, str(place.model(model)), place.device, place.size.new_tokens)
    return Found(figures={"tokens_per_s": {name: dict(speed) for name, speed in speeds.items()}})
