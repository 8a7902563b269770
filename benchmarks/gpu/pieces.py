"""The pieces of `make gpu`, in the order in which they run: the headline first, then what is right,
then the rest of what is fast."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import evaluation
from benchmarks.contestants import Adapter
from benchmarks.gpu import runs
from benchmarks.gpu.place import ROOT, Place, Skipped
from benchmarks.training import WORKS, matmul_peak, race, useful_flops
from cera_train.common.files import write_text
from cera_train.evaluation.generate import cache_room
from cera_train.model.attention import (
    BY_SEQUENCE,
    VARLEN,
    Sequences,
    attend_by_sequence,
    attend_varlen,
)
from cera_train.settings.adapters import AdapterKind
from cera_train.settings.evaluation import GenerationConfig

DEVICE = "CERA_TRAIN_GPU_TESTS"
"""The environment variable that lets the tests of tests/gpu run on another device than CUDA."""

RACERS = {
    "cera": "ours with CeRA",
    "cera_compiled": "ours with CeRA, compiled",
    "lora": "ours with LoRA",
    "trl": "TRL + LoRA, best",
}
"""Contestants by what they are called in the names of pieces."""

TESTS = {  # group: seconds that it should take, and its time limit
    "attention": (60, 180),
    "precision": (150, 300),
    "training": (150, 480),
    "answers": (60, 180),
    "processes": (150, 300),
}
MODEL = "llama3_1_8b"
BF16 = WORKS["llama3_1_8b, bfloat16"]
RACES = {
    "bfloat16": BF16,
    "bfloat16_without_dropout": replace(BF16, adapter=Adapter(dropout=0.0)),
    "nf4": WORKS["llama3_1_8b, nf4"],
    "nemo": replace(
        BF16,
        sequences=8,
        adapter=Adapter(rank=16, alpha=32, dropout=0.1, targets="all-linear"),
        max_length=4096,
    ),
}
"""Work of the races, by what it is called in the names of pieces."""


@dataclass(frozen=True)
class Piece:
    """A part of the acceptance that runs in a separate process."""

    name: str
    work: Callable[[Place], dict[str, Any]]
    """Returns the figures that it measured. Raises `Skipped`."""
    expected: int
    """Seconds that it should take: it starts where so many are left."""
    seconds: int
    """Its time limit."""
    takes_all_gpus: bool = False
    """Else it sees the first one only: several would split its work."""


@cache
def all_pieces() -> dict[str, Piece]:
    """By name, in the order in which they run: the headline in the first ten minutes."""
    pieces = [
        Piece("machine", machine, 60, 240),
        Piece("weights", make_weights, 60, 300),
        Piece("nemo_cera", partial(runs.nemo, kind="cera", compiles=(True, False)), 200, 540),
        Piece("nemo_lora", partial(runs.nemo, kind="lora"), 100, 300),
        Piece("nemo_trl", partial(lap, contestant=RACERS["trl"], work="nemo"), 120, 400),
        Piece("profile", profile, 100, 300),
        *(
            Piece(f"nemo_cera_{count}", partial(runs.nemo, kind="cera", at_once=count), 100, 300)
            for count in (2, 4)
        ),
    ]
    pieces += [
        Piece(
            f"tests_{group}",
            partial(run_tests, group=group),
            *limits,
            takes_all_gpus=group == "processes",
        )
        for group, limits in TESTS.items()
    ]
    pieces += [
        Piece(recipe, partial(runs.recipe, recipe=recipe, model=MODEL), 120, 400)
        for recipe in runs.RECIPES
    ]
    pieces += [
        Piece(f"race_{key}_{work}", partial(lap, contestant=contestant, work=work), 60, 400)
        for work in ("bfloat16", "bfloat16_without_dropout")
        for key, contestant in RACERS.items()
    ]
    pieces += [
        Piece(f"race_{key}_nf4", partial(lap, contestant=RACERS[key], work="nf4"), 60, 400)
        for key in ("cera_compiled", "trl")
    ]
    pieces += [
        Piece("decoding", decoding, 100, 400),
        Piece("answers", answers, 60, 300),
        Piece("grpo_samples", partial(answers, samples=8, temperature=1.0), 60, 300),
    ]
    return {piece.name: piece for piece in pieces}


def machine(place: Place) -> dict[str, Any]:
    """What the machine can do at most, and whether a small run takes the fast ways: products and
    copies, attention in one kernel beside one sequence at a time, graphs of a run with an
    evaluation."""
    work = replace(BF16, device=place.device)
    config = SimpleNamespace(**place.shape(MODEL))
    tiny = replace(place, size_name="tiny")
    run = runs.nemo(tiny, "cera")
    return {
        "TFLOP/s of products": matmul_peak(work, config, place.size.long_tokens) / 1e12,
        "GB/s of copies": copy_rate(place.device) / 1e9,
        **attention_seconds(place),
        **{name: value for name, value in run.items() if name.startswith("graphs")},
    }


def copy_rate(device: str) -> float:
    """Bytes a second that are read and written."""
    source = torch.empty(2**29 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def attention_seconds(place: Place) -> dict[str, float]:
    """Of a forward and a backward pass over the sequences of a flat row, by way of attention."""
    shape = place.shape(MODEL)
    heads = (shape["num_attention_heads"], *[shape["num_key_value_heads"]] * 2)
    lengths = [place.size.long_tokens // 8] * 8
    width = shape["hidden_size"] // heads[0]
    dtype = torch.bfloat16
    qkv = [
        torch.randn(
            1, count, sum(lengths), width, device=place.device, dtype=dtype
        ).requires_grad_()
        for count in heads
    ]
    module = SimpleNamespace(is_causal=True)

    def attend(function: Callable) -> None:
        output, _ = function(module, *qkv, None, sequences=Sequences(lengths))
        output.sum().backward()

    ways = {BY_SEQUENCE: attend_by_sequence}
    if place.device == "cuda":  # a CPU has no such kernel
        ways[VARLEN] = attend_varlen
    return {
        f"ms of {name} attention": 1000 * seconds_of(partial(attend, way), place.device)
        for name, way in ways.items()
    }


def seconds_of(function: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """The least of some rounds, after a warm-up."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(rounds + 1):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def profile(place: Place) -> dict[str, Any]:
    """Milliseconds of an update of NeMo's setting, by the kernels that take the most; all of them
    are in profile.txt."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = place.device == "cuda"
    activities = [activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        runs.nemo(place, "cera")
    by_kernel = profiler.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = by_kernel.table(sort_by=order, row_limit=200, max_name_column_width=120)
    write_text(place.folder / "profile.txt", table)
    largest = sorted(by_kernel, key=lambda event: -getattr(event, order))[:12]
    updates = place.size.long_updates
    return {event.key[:60]: getattr(event, order) / 1000 / updates for event in largest}


def run_tests(place: Place, group: str) -> dict[str, Any]:
    """Runs tests/gpu/test_gpu_GROUP.py, whose log has what failed and why some were skipped."""
    tests = [
        f"tests/gpu/test_gpu_{group}.py",
        "-m",
        "gpu",
        "-v",
        "-rs",
        "--showlocals",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *tests]
    environment = os.environ | {DEVICE: place.device}
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    if process.returncode != 0:
        raise RuntimeError(f"{last} (pytest ended with status {process.returncode})")
    if " passed" not in last:
        raise Skipped(last)
    return {"tests": last}


def make_weights(place: Place) -> dict[str, Any]:
    """Makes the model that other pieces load."""
    place.model(MODEL)
    return {}


def lap(place: Place, contestant: str, work: str) -> dict[str, Any]:
    """Updates of one contestant of benchmarks.training, on the rows that all of them get."""
    size = place.size
    is_long = work == "nemo"
    chosen = replace(RACES[work], device=place.device)
    if place.size_name == "tiny":
        chosen = replace(chosen, sequences=4)
    tokens = size.long_tokens if is_long else size.row_tokens
    rows = (size.rounds + 1) * chosen.sequences + 1  # one is held out
    columns = ("question", "answer")
    # The template takes some tokens of a full sequence.
    file = place.rows(f"race_{work}", rows, tokens - 16 * is_long, columns, is_even=is_long)
    base = str(place.model(MODEL))
    config = AutoConfig.from_pretrained(base)
    flops, tokens, supervised = useful_flops(
        place.tokenizer, config, file, chosen.sequences, size.rounds
    )
    measured = race([contestant], chosen, base, file, supervised)
    seconds = measured["seconds"][contestant]

    def rate(amounts: Sequence[float]) -> float:
        return statistics.median(
            amount / taken for amount, taken in zip(amounts, seconds, strict=True)
        )

    return {
        "tokens/s": rate(tokens),
        "seconds an update": statistics.median(seconds),
        "useful TFLOP/s": rate(flops) / 1e12,
        "peak GB": measured["peak_memory_bytes"][contestant] / 1e9,
    }


def decoding(place: Place) -> dict[str, Any]:
    """New tokens a second of the base, or LoRA merged into it, and of CeRA, by the rows of a
    batch."""
    file = evaluation.word_problems(place.folder / "problems.jsonl")
    _, steps = evaluation.decoding(
        file, place.size.rounds, path=str(place.model(MODEL)), device=place.device
    )
    return {
        f"{name}, {rows} rows, tokens/s": rows / statistics.median(seconds)
        for name, taken in steps.items()
        for rows, seconds in taken.items()
    }


def answers(place: Place, samples: int = 1, temperature: float = 0.0) -> dict[str, Any]:
    """How fast CeRA answers many problems, or samples several answers to each of a few, as GRPO
    does."""
    size = place.size
    problems = size.answers // samples
    file = evaluation.word_problems(place.folder / f"problems_{problems}.jsonl", problems)
    engine = evaluation.Answering(AdapterKind.cera, str(place.model(MODEL)), place.device)
    requests = [
        replace(request, sample=sample)
        for request in engine.requests(file, problems)
        for sample in range(samples)
    ]
    config = GenerationConfig(samples=samples, temperature=temperature)
    batches = engine.batches(requests, size.answer_tokens, config, processes=1)
    started = time.perf_counter()
    ended = itertools.chain(*engine.answers(batches, size.answer_tokens, [], config))
    tokens = sum(answer.generation.tokens for answer in ended)
    seconds = time.perf_counter() - started
    return {
        "answers/s": len(requests) / seconds,
        "new tokens/s": tokens / seconds,
        "rows of a batch": max(map(len, batches)),
        "GB of keys and values": cache_room(engine.base.device) / 1e9,
    }
