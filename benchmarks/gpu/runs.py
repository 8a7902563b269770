"""Whole runs of cera-train: recipes, and the public setting of NeMo AutoModel. Throughput and peak
memory as measured, beside what cera-plan predicts."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.place import Place, Skipped
from cera_train.cli.compose import compose
from cera_train.planning.make import make_plan
from cera_train.planning.plan import USABLE

RECIPES = ("math_r64", "math_lora_r512", "math_r64_nf4")
EVALUATION_ROWS = 64
CHECKPOINTED = "model.gradient_checkpointing=true"

NEMO_TOKENS_PER_S = 12_473
"""Of NeMo AutoModel's LoRA on Llama-3.1-8B and one H100, by docs/performance-summary.md and
examples/llm_finetune/llama3_1/llama3_1_8b_peft_benchmark.yaml of github.com/NVIDIA-NeMo/Automodel:
r = 16 on all linears, alpha 32, dropout 0.1, bf16, 32 full sequences of 4,096 tokens an update, two
at a time."""


def recipe(place: Place, recipe: str, model: str) -> dict[str, Any]:
    """A recipe, on rows that are as long as MathInstruct's."""
    size = place.size
    rows = place.rows(
        "math",
        size.updates * size.batch_size + EVALUATION_ROWS,
        size.row_tokens,
        ("instruction", "output"),
    )
    overrides = [
        f"+recipe={recipe}",
        f"data.eval_rows={EVALUATION_ROWS}",
        f"train.batch_size={size.batch_size}",
    ]
    if recipe == "math_r64_nf4" and place.device == "cpu":  # its optimizer pages GPU memory
        overrides.append("optimizer=adamw_8bit")
    return _run(
        place, f"{recipe}_{model}", model, rows, size.updates, [*overrides, *size.overrides]
    )


def nemo(place: Place, kind: str) -> dict[str, Any]:
    """NeMo AutoModel's setting with an adapter of ours, all tokens supervised. The sequences go one
    at a time, as both adapters fit; how many go at once changes no gradient."""
    size = place.size
    updates = size.updates // 3
    rows = place.rows(
        "long",
        updates * size.long_batch + 2,
        size.long_tokens,
        ("instruction", "output"),
        is_even=True,
    )
    overrides = {
        other: [
            f"+recipe=math_{recipe}",
            *size.overrides,
            "adapter.r=16",
            "adapter.alpha=32",
            "adapter.dropout=0.1",
            "adapter.target_modules=all-linear",
            f"data.max_length={size.long_tokens}",
            "data.eval_rows=2",
            f"train.batch_size={size.long_batch}",
            f"train.micro_batch_tokens={size.long_tokens}",
            "optimizer.lr=1e-5",
            "train.probe_tokens=2048",
        ]
        for other, recipe in (("lora", "lora_r512"), ("cera", "r64"))
    }
    first = overrides.pop(kind)
    figures = _run(place, f"nemo_{kind}", "llama3_1_8b", rows, updates, first, *overrides.values())
    return figures | {"tokens/s of NeMo's LoRA, as published": NEMO_TOKENS_PER_S}


def _run(
    place: Place,
    name: str,
    model: str,
    rows: Path,
    updates: int,
    overrides: Sequence[str],
    *compared: Sequence[str],
) -> dict[str, Any]:
    """Trains, where the plan fits this GPU; with gradient checkpointing where it, or a run that it
    is `compared` with, fits only so."""
    from cera_train.training.train import train

    folder = place.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # of a piece that was cut
    common = [
        f"model.path={place.model(model)}",
        "data.path=null",
        f"data.train_files=[{rows}]",
        f"train.max_updates={updates}",
        "train.eval_every=null",
        "train.save_every=null",
        f"name={name}",
        f"output_dir={folder.parent}",
    ]
    room = _room(place)
    for checkpointing in ([], [CHECKPOINTED]):
        planned = [
            _planned_peak(place, [*common, *each, *checkpointing])
            for each in (overrides, *compared)
        ]
        if max(planned) <= room:
            break
    else:
        raise Skipped(f"needs {max(planned) / 1e9:.0f} GB by cera-plan, even with {CHECKPOINTED}")
    result = train(compose(*common, *overrides, *checkpointing))
    return {
        **_speed(folder / "metrics.jsonl", place.size.warm_up),
        "peak GB": result["peak_memory_bytes"] / 1e9,
        "planned GB": planned[0] / 1e9,
        "checkpointing": bool(checkpointing),
    }


def _planned_peak(place: Place, settings: Sequence[str]) -> float:
    """Bytes, by cera-plan."""
    device = "cpu" if place.device == "cpu" else "h100"  # memory is alike on every GPU
    return make_plan(compose(*settings, f"plan.gpu={device}", command="plan")).peak


def _room(place: Place) -> float:
    """Bytes that a run may take here."""
    if place.device == "cpu":
        return float("inf")

    return USABLE * torch.cuda.get_device_properties(0).total_memory


def _speed(metrics: Path, warm_up: int) -> dict[str, float]:
    """Median seconds of an update and tokens a second, without the first updates."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    updates = [line for line in lines if "train/loss" in line]
    totals = [line["train/seconds"] for line in updates]
    return {
        "tokens/s": statistics.median(line["train/tokens_per_s"] for line in updates[warm_up:]),
        "seconds an update": statistics.median(
            after - before for before, after in itertools.pairwise(totals[warm_up - 1 :])
        ),
        "first loss": updates[0]["train/loss"],
        "last loss": updates[-1]["train/loss"],
    }
