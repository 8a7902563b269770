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
from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.planning.make import make_plan
from cera_train.planning.plan import USABLE

RECIPES = ("math_r64", "math_r64_nf4")
CHECKPOINTED = "model.gradient_checkpointing=true"
ATTENTION = {"cuda": VARLEN, "cpu": BY_SEQUENCE}
"""The fastest by device: a piece fails with any other."""

NEMO_TOKENS_PER_S = 12_473
"""Of NeMo AutoModel's LoRA on Llama-3.1-8B and one H100, by docs/performance-summary.md and
examples/llm_finetune/llama3_1/llama3_1_8b_peft_benchmark.yaml of github.com/NVIDIA-NeMo/Automodel:
r = 16 on all linears, alpha 32, dropout 0.1, bf16, 32 full sequences of 4,096 tokens an update, two
at a time."""

NEMO = (
    "adapter.r=16",
    "adapter.alpha=32",
    "adapter.dropout=0.1",
    "adapter.target_modules=all-linear",
    "optimizer.lr=1e-5",
    "train.probe_tokens=2048",
)
KINDS = {"cera": "+recipe=math_r64", "lora": "+recipe=math_lora_r512"}


def recipe(place: Place, recipe: str, model: str) -> dict[str, Any]:
    """A recipe, on rows that are as long as MathInstruct's."""
    size = place.size
    overrides = [
        f"+recipe={recipe}",
        *rows_settings(place.math_rows(), size.eval_rows),
        f"train.batch_size={size.batch_size}",
        f"train.compile={str(place.device == 'cuda').lower()}",
        *size.overrides,
    ]
    if recipe == "math_r64_nf4" and place.device == "cpu":  # its optimizer pages GPU memory
        overrides.append("optimizer=adamw_8bit")
    return _run(place, f"{recipe}_{model}", model, size.updates, overrides)


def rows_settings(rows: Path, eval_rows: int) -> list[str]:
    return ["data.path=null", f"data.train_files=[{rows}]", f"data.eval_rows={eval_rows}"]


def nemo(
    place: Place, kind: str, compiles: Sequence[bool] = (True,), at_once: int = 1
) -> dict[str, Any]:
    """NeMo AutoModel's setting with an adapter of ours, all tokens supervised, in updates of fewer
    sequences. How many sequences go at once changes no gradient.

    Args:
        compiles: whether the layers of each run are compiled, one run after the other; a CPU's stay
            eager.
    """
    size = place.size
    compiles = compiles if place.device == "cuda" else [False]
    figures = {}
    for is_compiled in compiles:
        way = "compiled" if is_compiled else "eager"
        overrides = [
            KINDS[kind],
            *rows_settings(place.long_rows(), eval_rows=2),
            *size.overrides,
            *NEMO,
            f"data.max_length={size.long_tokens}",
            f"train.batch_size={size.long_batch}",
            f"train.micro_batch_tokens={at_once * size.long_tokens}",
            f"train.compile={str(is_compiled).lower()}",
        ]
        name = f"nemo_{kind}_{way}_{at_once}"
        measured = _run(place, name, "llama3_1_8b", size.long_updates, overrides)
        figures |= {f"{figure}, {way}": value for figure, value in measured.items()}
    return figures | {"tokens/s of NeMo's LoRA, as published": NEMO_TOKENS_PER_S}


def _run(
    place: Place, name: str, model: str, updates: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Trains, where the plan fits this GPU; else with gradient checkpointing.

    Raises:
        RuntimeError: attention is not the fastest, or layers that were to be compiled ran eagerly.
    """
    from cera_train.training.train import train

    folder = place.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # of a piece that was cut
    common = [
        f"model.path={place.model(model)}",
        f"train.max_updates={updates}",
        "train.eval_every=null",
        "train.save_every=null",
        f"name={name}",
        f"output_dir={folder.parent}",
    ]
    room = _room(place)
    for checkpointing in ([], [CHECKPOINTED]):
        planned = _planned_peak(place, [*common, *overrides, *checkpointing])
        if planned <= room:
            break
    else:
        raise Skipped(f"needs {planned / 1e9:.0f} GB by cera-plan, even with {CHECKPOINTED}")
    config = compose(*common, *overrides, *checkpointing)
    result = train(config)
    check_speed(result, place.device, bool(config.train.compile))
    figures = _speed(folder / "metrics.jsonl", place.size.warm_up)
    figures |= {
        "attention": result["attention"],
        "graphs": result["compiled_graphs"],
        "peak GB": result["peak_memory_bytes"] / 1e9,
        "planned GB": planned / 1e9,
        "checkpointing": bool(checkpointing),
    }
    if place.device == "cuda":
        figures["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
    return figures


def check_speed(result: dict[str, Any], device: str, compiles: bool) -> None:
    """Raises RuntimeError where a run took a slower way than it was meant to."""
    if result["fallbacks"]:
        raise RuntimeError(f"it fell back: {'; '.join(result['fallbacks'])}")
    if result["attention"] != ATTENTION[device]:
        raise RuntimeError(f"attention was {result['attention']}, not {ATTENTION[device]}")
    if compiles and not result["compiled_graphs"]:
        raise RuntimeError("no graph was compiled: the layers ran eagerly")


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
    """Median seconds of an update and tokens a second, without the first updates; and by how much
    the first one took longer, which is the time of compiling."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    updates = [line for line in lines if "train/loss" in line]
    totals = [line["train/seconds"] for line in updates]
    seconds = statistics.median(
        after - before for before, after in itertools.pairwise(totals[warm_up - 1 :])
    )
    return {
        "tokens/s": statistics.median(line["train/tokens_per_s"] for line in updates[warm_up:]),
        "seconds an update": seconds,
        "seconds of compiling": totals[warm_up - 1] - warm_up * seconds,
        "first loss": updates[0]["train/loss"],
        "last loss": updates[-1]["train/loss"],
    }
