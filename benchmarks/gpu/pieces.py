"""The pieces of `make gpu`, in the order in which they run: what is right first, then what is fast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import decoding, race, runs, testing
from benchmarks.gpu.place import Place
from benchmarks.gpu.results import MEASURED, TESTED, Found


@dataclass(frozen=True)
class Piece:
    """A part of the acceptance that runs in a separate process."""

    name: str
    shows: str
    work: Callable[[Place], Found]
    expected: int
    """Seconds that it should take: it starts where so many are left."""
    seconds: int
    """Its time limit: a command of ten minutes has time for it and for its own start and end."""
    sources: tuple[str, ...] = MEASURED
    """Folders whose change makes it run again."""
    takes_all_gpus: bool = False
    """Else it sees the first one alone, as all that it is compared with does."""


def make_weights(place: Place, model: str) -> Found:
    """Makes the model that other pieces load."""
    place.model(model)
    return Found()


def tests() -> list[Piece]:
    groups = {
        "attention": ("the varlen kernel against SDPA; flat rows against padded ones", 60, 180),
        "precision": ("NF4 and int8 training and evaluation, paged 8-bit AdamW, the scaler of float16", 150, 300),
        "training": ("bf16 resume, torch.compile, experts", 150, 480),
        "answers": ("decoding against generate", 60, 180),
        "processes": ("DDP and FSDP2 over NCCL, on two GPUs", 150, 300),
    }
    return [
        Piece(
            f"tests_{group}",
            shows,
            functools.partial(testing.run_tests, group=group),
            expected,
            seconds,
            TESTED,
            takes_all_gpus=group == "processes",
        )
        for group, (shows, expected, seconds) in groups.items()
    ]


def of_model(model: str, title: str) -> list[Piece]:
    """Recipes, race and decoding on one shape."""
    is_large = model == "llama3_1_8b"
    pieces = [
        Piece(
            f"weights_{model}",
            f"random weights of {title}",
            functools.partial(make_weights, model=model),
            *((150, 540) if is_large else (60, 300)),
        )
    ]
    for recipe in runs.RECIPES:
        pieces.append(
            Piece(
                f"{recipe}_{model}",
                f"{recipe}, 20 updates on {title}",
                functools.partial(runs.recipe, recipe=recipe, model=model),
                *((150, 540) if is_large else (60, 300)),
            )
        )
    for precision in ("bfloat16", "nf4") if is_large else ("bfloat16",):
        for key, contestant in race.RACERS.items():
            pieces.append(
                Piece(
                    f"race_{key}_{model}_{precision}",
                    f"{contestant} on {title}, {precision}",
                    functools.partial(race.lap, contestant=contestant, model=model, precision=precision),
                    *((120, 420) if is_large else (60, 300)),
                )
            )
    pieces.append(
        Piece(
            f"decoding_{model}",
            f"decoding with CeRA beside merged LoRA on {title}",
            functools.partial(decoding.decoding, model=model),
            *((120, 420) if is_large else (60, 240)),
        )
    )
    return pieces


def nemo() -> list[Piece]:
    return [
        Piece(
            f"nemo_{kind}",
            f"{kind} in the public setting of NeMo AutoModel, 4,096 tokens a sequence",
            functools.partial(runs.nemo, kind=kind),
            150,
            540,
        )
        for kind in ("lora", "cera")
    ]


@functools.cache
def all_pieces() -> dict[str, Piece]:
    """By name."""
    large, small = of_model("llama3_1_8b", "Llama-3.1-8B's shape"), of_model("llama3_2_1b", "Llama-3.2-1B's shape")
    return {piece.name: piece for piece in (*tests(), *large, *nemo(), *small)}
