"""What the pieces of `make gpu` do, each in a process of its own: `python -m benchmarks.gpu.work
PIECE DEVICE SIZE OUTPUT`."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import evaluation, tiny_models
from benchmarks.contestants import Work
from benchmarks.gpu.pieces import BY_NAME, DEVICE, ROOT, Place
from benchmarks.rows import random_rows, write_rows
from benchmarks.training import PACKAGE, die_with_parent, race
from cera_train.cli.compose import compose
from cera_train.common.files import config_dir, write_text
from cera_train.model.attention import BY_SEQUENCE, VARLEN
from cera_train.model.folder import load_tokenizer
from cera_train.planning.plan import USABLE, make_plan
from cera_train.runs.results import METRICS, read_metrics
from cera_train.settings.model import ModelConfig
from cera_train.training.train import train

MODEL = "llama3_1_8b"
TOKENIZER = ROOT / "tokenizer"
"""SmolLM2's, where `make gpu-bundle` wrote it."""
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
)
EVAL_ROWS = 8
COLUMNS = ("instruction", "output")
"""Of the recipes' rows."""
RECIPES = {"cera": "math_r64", "lora": "math_lora_r512"}
WORKS = {
    "bfloat16": Work("bfloat16", 32, micro_batch_tokens=4096),
    "nf4": Work("nf4", 32, micro_batch_tokens=4096),
    "nemo": Work(
        "bfloat16",
        8,
        rank=16,
        alpha=32,
        targets="all-linear",
        max_length=4096,
        micro_batch_tokens=4096,
    ),
}
"""Of the race."""


class Skipped(Exception):
    """A piece cannot run here; the message says why."""


@dataclass(frozen=True)
class Size:
    """How much work the pieces do."""

    updates: int = 10
    """Of a run."""
    warm_up: int = 3
    """Updates at the start that do not count."""
    batch_size: int = 32
    row_tokens: int = 171
    """Mean tokens of a row of MathInstruct, by conf/data/mathinstruct.yaml."""
    long_batch: int = 8
    long_tokens: int = 4096
    """Sequences of an update, and their tokens, of NeMo's setting."""
    rounds: int = 5
    """Of the race, an update each, and of decoding; a warm-up is not counted."""
    overrides: tuple[str, ...] = ()
    """Settings of every run."""


SIZES = {
    "full": Size(),
    "tiny": Size(
        updates=4,
        warm_up=1,
        batch_size=4,
        row_tokens=24,
        long_batch=4,
        long_tokens=128,
        rounds=1,
        overrides=("adapter.r=4", "data.max_length=128"),
    ),
}


# --- models and rows ------------------------------------------------------------------------------


def random_model(place: Place) -> Path:
    """A folder with a Llama of MODEL's shape, random weights and SmolLM2's tokenizer (Llama's is
    gated), made the first time."""
    folder = place.output / "models" / f"{MODEL}_{place.size}"
    if not folder.is_dir():
        part = folder.with_name(f"part-{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        shape = json.loads((config_dir("conf") / "model" / f"{MODEL}.json").read_text())
        shape |= tiny_models.SIZES if place.size == "tiny" else {}
        with torch.device(place.device):
            config = LlamaConfig(**shape)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(part, max_shard_size="4GB")  # a file at a time is copied off the GPU
        path = str(TOKENIZER) if TOKENIZER.is_dir() else PACKAGE
        load_tokenizer(ModelConfig(path=path)).save_pretrained(part)
        part.rename(folder)
    return folder


# --- whole runs -----------------------------------------------------------------------------------


def recipe(place: Place, name: str) -> dict[str, Any]:
    """A recipe, on rows that are as long as MathInstruct's."""
    size = SIZES[place.size]
    count = size.updates * size.batch_size + EVAL_ROWS
    rows = random_rows(count, size.row_tokens, COLUMNS)
    overrides = [f"train.batch_size={size.batch_size}"]
    if name == "math_r64_nf4" and place.device == "cpu":  # its optimizer pages GPU memory
        overrides.append("optimizer=adamw_8bit")
    return run(place, name, name, write_rows(place.rows(name), rows), overrides)


def nemo(place: Place, kind: str) -> dict[str, Any]:
    """NeMo AutoModel's setting with an adapter of ours, all tokens supervised, in updates of fewer
    sequences, one at a time."""
    size = SIZES[place.size]
    count = size.updates * size.long_batch + EVAL_ROWS
    rows = random_rows(count, size.long_tokens, COLUMNS, prompt=0, spread=0)
    overrides = [
        *NEMO,
        f"data.max_length={size.long_tokens}",
        f"train.batch_size={size.long_batch}",
        f"train.micro_batch_tokens={size.long_tokens}",
    ]
    name = f"nemo_{kind}"
    figures = run(place, name, RECIPES[kind], write_rows(place.rows(name), rows), overrides)
    return figures | {"tokens/s of NeMo's LoRA, as published": NEMO_TOKENS_PER_S}


def run(
    place: Place, name: str, recipe: str, rows: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Trains, with compiled layers on a GPU: throughput and peak memory as measured, beside what
    cera-plan predicts.

    Raises:
        Skipped: the plan does not fit this GPU.
        RuntimeError: attention is not the fastest, or layers that were to be compiled ran eagerly.
    """
    size = SIZES[place.size]
    on_gpu = place.device == "cuda"
    folder = place.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # of a piece that was cut
    words = [
        f"+recipe={recipe}",
        f"model.path={random_model(place)}",
        "data.path=null",
        f"data.train_files=[{rows}]",
        f"data.eval_rows={EVAL_ROWS}",
        f"train.max_updates={size.updates}",
        f"train.compile={str(on_gpu).lower()}",
        "train.eval_every=null",
        "train.save_every=null",
        f"name={name}",
        f"output_dir={folder.parent}",
        *size.overrides,
        *overrides,
    ]
    device = "h100" if on_gpu else "cpu"  # memory is alike on every GPU
    planned = make_plan(compose(*words, f"plan.gpu={device}", command="plan")).peak
    if on_gpu and planned > USABLE * torch.cuda.get_device_properties(0).total_memory:
        raise Skipped(f"needs {planned / 1e9:.0f} GB by cera-plan")
    result = train(compose(*words))
    check_speed(result, place.device)
    return speed(folder / METRICS, size.warm_up) | {
        "attention": result["attention"],
        "graphs": result["compiled_graphs"],
        "peak GB": result["peak_memory_bytes"] / 1e9,
        "planned GB": planned / 1e9,
    }


def check_speed(result: dict[str, Any], device: str) -> None:
    """Raises RuntimeError where a run took a slower way than it was meant to."""
    if result["fallbacks"]:
        raise RuntimeError(f"it fell back: {'; '.join(result['fallbacks'])}")
    if result["attention"] != ATTENTION[device]:
        raise RuntimeError(f"attention was {result['attention']}, not {ATTENTION[device]}")
    if device == "cuda" and not result["compiled_graphs"]:
        raise RuntimeError("no graph was compiled: the layers ran eagerly")


def speed(metrics: Path, warm_up: int) -> dict[str, float]:
    """Median tokens a second, without the first updates, and the first and last loss."""
    updates = read_metrics(metrics).updates
    return {
        "tokens/s": statistics.median(update.tokens_per_s for update in updates[warm_up:]),
        "first loss": updates[0].loss,
        "last loss": updates[-1].loss,
    }


# --- the other pieces -----------------------------------------------------------------------------


def make_weights(place: Place) -> dict[str, Any]:
    """Makes the model that other pieces load."""
    random_model(place)
    return {}


def run_tests(place: Place, group: str) -> dict[str, Any]:
    """Runs tests/gpu/test_gpu_GROUP.py, whose log has what failed and why some were skipped."""
    tests = f"tests/gpu/test_gpu_{group}.py -m gpu -v -rs --showlocals -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *tests.split()]
    environment = os.environ | {DEVICE: place.device}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    last = done.stdout.strip("= \n").splitlines()[-1].strip("= ")
    if done.returncode != 0:
        raise RuntimeError(f"{last} (pytest ended with status {done.returncode})")
    if " passed" not in last:
        raise Skipped(last)
    return {"tests": last}


def lap(place: Place, contestant: str, work: str) -> dict[str, Any]:
    """Updates of one contestant of benchmarks.training, on the rows that all of them get."""
    size = SIZES[place.size]
    chosen = replace(WORKS[work], device=place.device, sequences=size.batch_size)
    rows = {"tokens": size.row_tokens}
    if work == "nemo":
        chosen = replace(chosen, sequences=size.long_batch)
        # The template takes some tokens of a full sequence.
        rows = {"tokens": size.long_tokens - 16, "prompt": 0, "spread": 0}
    count = (size.rounds + 1) * chosen.sequences + 1  # one is held out
    file = write_rows(place.rows(f"race_{work}"), random_rows(count, **rows))
    measured = race([contestant], chosen, str(random_model(place)), file, size.rounds)
    seconds = measured.seconds[contestant]

    def rate(amounts: Sequence[float]) -> float:
        return statistics.median(
            amount / taken for amount, taken in zip(amounts, seconds, strict=True)
        )

    return {
        "tokens/s": rate(measured.tokens),
        "seconds an update": statistics.median(seconds),
        "useful TFLOP/s": rate(measured.flops) / 1e12,
        "peak GB": measured.peak_memory[contestant] / 1e9,
    }


def decoding(place: Place) -> dict[str, Any]:
    """New tokens a second of the base, or LoRA merged into it, and of CeRA, by the rows of a
    batch."""
    size = SIZES[place.size]
    file = write_rows(place.rows("decoding"), random_rows(1, size.row_tokens))
    path = str(random_model(place))
    steps = evaluation.decoding(file, size.rounds, path=path, device=place.device)
    return {
        f"{name}, {rows} rows, tokens/s": rows / statistics.median(seconds)
        for name, taken in steps.items()
        for rows, seconds in taken.items()
    }


FUNCTIONS = {
    function.__name__: function
    for function in (make_weights, run_tests, recipe, nemo, lap, decoding)
}


def main() -> None:
    """Writes the figures of a piece, or why it was skipped."""
    die_with_parent()
    os.environ["WANDB_MODE"] = "offline"
    name, device, size, output = sys.argv[1:]
    place = Place(device, size, Path(output))
    piece = BY_NAME[name]
    result = {"state": "passed", "reason": "", "figures": {}}
    try:
        result["figures"] = FUNCTIONS[piece.work](place, **piece.settings)
    except Skipped as skipped:
        result |= {"state": "skipped", "reason": str(skipped)}
    write_text(place.result(name), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
