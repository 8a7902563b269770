"""Whatever a user chooses together, a run keeps the same promises.

The rows of FACTORS are a covering array: of the pairs of choices, forty rows have more than half,
three hundred nearly all. `make test-nightly` takes three hundred of a seed of its own;
CERA_SEED=SEED pytest tests/properties -k SEED-NUMBER repeats one.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import write_bases
from choices import FACTORS
from covertable import criteria
from covertable.main import Controller
from life import Life, start_forking
from peft import PeftModel
from tiny_runs import adapter_bytes, all_losses_of, metrics_of, timeless_metrics
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cera_train.data.prepare import TokenizedRows, prepare_evaluation
from cera_train.runs.evaluation_folder import PerplexityResult
from cera_train.runs.records import load_config
from cera_train.runs.results import (
    LOSSES_AFTER,
    LOSSES_BEFORE,
    SAMPLES,
    RunResult,
    TokenLosses,
)

SEED = os.environ.get("CERA_SEED", "0")
IS_NIGHTLY = "CERA_SEED" in os.environ
COUNT = 300 if IS_NIGHTLY else 10
FAST = 2

Row = dict[str, str]


def draw(seed: str, count: int) -> list[Row]:
    """The first rows of a covering array of pairs. A choice that is named twice is drawn twice as
    often."""
    choices = {
        factor: [choice for choice, weight in weights.items() for _ in range(weight)]
        for factor, weights in FACTORS.items()
    }
    numbers = {factor: list(range(len(drawn))) for factor, drawn in choices.items()}
    array = Controller(numbers, salt=seed, criterion=criteria.simple)
    rows = itertools.islice(array.make_async(), count)
    return [{factor: choices[factor][number] for factor, number in row.items()} for row in rows]


STARTS_AWAY = {"C3A", "FOURIERFT", "WAVEFT"}
"""Methods of PEFT that begin with a change of the base."""

ROUNDED = {"pissa": 0.05, "full": 2e-3, "dora": 1e-3}
"""Relative differences of a base's loss: PiSSA splits W0, a full fine-tuning is in float32,
where a token may take another expert than in 16 bits, and DoRA divides W0 by its norm."""


# --- properties -----------------------------------------------------------------------------------


def every_command_ends_well_or_in_one_line_with_a_fix(life: Life) -> None:
    for ended in life.commands():
        is_killed = ended.status in (-9, 143) and ended is life.ended["cut"]
        assert ended.status == 0 or is_killed or ended.refusal is not None, ended
    for step in ("resumed", "asked", "reported"):
        assert life.ended[step].status == 0, life.ended[step]


def a_plan_refuses_what_its_run_refuses_in_the_same_words(life: Life) -> None:
    for plan, run, has_begun in life.refused:
        assert not has_begun, f"refused after it began to train: {run}"
        needs_weights = "depends on later tokens" in (run.refusal or "")
        assert needs_weights or plan.refusal == run.refusal, f"{run}; the plan: {plan}"
    assert life.ended["plan"].status == 0, life.ended["plan"]


def a_run_trains_what_was_planned(life: Life) -> None:
    planned = life.ended["plan"].printed
    result = RunResult.read(life.whole / "result.json")
    assert number_after("trains", planned) == result.trainable_parameters
    assert number_after("work", planned) == result.updates
    rows, unit = re.search(r"train +([\d,]+) (\w+)", life.ended["whole"].printed).groups()
    sides = 2 if unit == "answers" else 1  # of a preference
    assert sides * number_after(":", planned) == int(rows.replace(",", ""))


def a_killed_and_moved_run_ends_as_an_uninterrupted_one_to_the_byte(life: Life) -> None:
    assert adapter_bytes(life.resumed) == adapter_bytes(life.whole)
    assert timeless_metrics(life.resumed) == timeless_metrics(life.whole)
    for name in (LOSSES_BEFORE, LOSSES_AFTER, SAMPLES, "best/metrics.json"):
        resumed, whole = (run / name for run in (life.resumed, life.whole))
        assert resumed.exists() == whole.exists(), name
        assert not whole.exists() or resumed.read_bytes() == whole.read_bytes(), name


def an_evaluation_has_the_figures_of_the_run(life: Life) -> None:
    if life.settings.get("train.objective") == "dpo":  # a run's figure is that of the choice
        return
    first, *_, last = evaluated_losses(life.whole)
    config = load_config(life.whole / "config.yaml")
    # Compiled layers, which an evaluation has not, round to 16 bits at fewer places.
    same = 2e-3 if config.train.compile and config.model.dtype != "float32" else 1e-5
    if life.has_start:
        assert first == evaluated_losses(life.folder / "start")[-1]
    elif life.settings.get("adapter.method") not in STARTS_AWAY:
        [base] = life.folder.glob("base-*")
        rounded = ROUNDED.get(life.settings["adapter"], same)
        assert loss_of(base) == pytest.approx(first, rel=rounded)
    assert loss_of(life.resumed) == pytest.approx(last, rel=same)


def losses_depend_on_neither_micro_batches_nor_processes(life: Life) -> None:
    config = load_config(life.whole / "config.yaml")
    rounds = config.model.dtype != "float32" or config.model.quantization != "none"
    if rounds or config.adapter.dropout or config.train.objective == "grpo":
        return
    if not config.train.check_coverage:  # a token's loss depends on the other tokens of its batch
        return
    # Later Adam enlarges what rounding changed: DeLoRA's by 4e-5 after four updates, and a state of
    # 8 bits by 1e-3 after two, where a value falls on its other side.
    updates = 2 if config.optimizer.kind.endswith("8bit") else 3
    other, whole = (all_losses_of(run)[:updates] for run in (life.other, life.whole))
    assert other == pytest.approx(whole, rel=1e-5)


def plain_peft_computes_the_run(life: Life) -> None:
    config = load_config(life.whole / "config.yaml")
    if config.model.quantization != "none" or config.train.objective == "dpo":
        return  # PEFT's user quantises the base; losses are those of the choice
    if not config.train.check_coverage:  # as above
        return
    options = {"dtype": config.model.dtype}
    adapter = life.whole / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    if config.adapter.kind == "full":
        model = AutoModelForCausalLM.from_pretrained(adapter, **options)
    else:
        base = AutoModelForCausalLM.from_pretrained(life.place / config.model.path, **options)
        model = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        rows = prepare_evaluation(config.data, tokenizer)
        losses = torch.cat([losses_of_row(model, rows, row) for row in range(len(rows))])
    trained = TokenLosses.read(life.whole / LOSSES_AFTER).losses
    if config.model.dtype == "float32":
        assert losses.numpy() == pytest.approx(trained, abs=1e-4)
    else:  # PEFT computes an adapter in float32, a run under autocast: one token may be far
        assert abs(losses.numpy() - trained).mean() < 0.1


def an_export_holds_its_certificate(life: Life) -> None:
    exported = life.ended["exported"]
    is_far = exported.status == 3 and "fit of a LoRA" in exported.refusal
    has_no_form = exported.status == 2 and "train with adapter." in exported.refusal
    assert exported.status == 0 or is_far or has_no_form, exported


def losses_of_row(model: nn.Module, rows: TokenizedRows, row: int) -> torch.Tensor:
    ids, counts = (
        torch.tensor(rows.tokens(name, row).to_pylist()) for name in ("input_ids", "loss_mask")
    )
    logits = model.eval()(input_ids=ids[None]).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, ids[1:], reduction="none")[counts[1:].bool()]


# --- rows -----------------------------------------------------------------------------------------


def number_after(name: str, printed: str) -> int:
    return int(re.search(rf"{name} +([\d,]+)", printed)[1].replace(",", ""))


def evaluated_losses(run: Path) -> list[float]:
    return [line["eval/loss"] for line in metrics_of(run) if "eval/loss" in line]


def loss_of(folder: Path) -> float:
    return math.log(
        PerplexityResult.read(folder / "eval" / "perplexity" / "result.json").perplexity
    )


PROPERTIES = [
    every_command_ends_well_or_in_one_line_with_a_fix,
    a_plan_refuses_what_its_run_refuses_in_the_same_words,
    a_run_trains_what_was_planned,
    a_killed_and_moved_run_ends_as_an_uninterrupted_one_to_the_byte,
    an_evaluation_has_the_figures_of_the_run,
    losses_depend_on_neither_micro_batches_nor_processes,
    plain_peft_computes_the_run,
    an_export_holds_its_certificate,
]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    place = tmp_path_factory.mktemp("lives")
    write_bases(place, tokenizer)
    start_forking()
    return place


def rows() -> Iterator[Any]:
    for number, row in enumerate(draw(SEED, COUNT)):
        marks = pytest.mark.nightly if IS_NIGHTLY else pytest.mark.slow
        is_fast = number < FAST and not IS_NIGHTLY
        yield pytest.param(row, id=f"{SEED}-{number}", marks=() if is_fast else marks)


@pytest.mark.parametrize("row", list(rows()))
def test_a_life_keeps_its_promises(row, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    life = Life(row, place, tmp_path / "life")
    broken = {}
    for promise in (Life.live, *PROPERTIES):
        try:
            promise(life)
        except Exception as error:
            broken[promise.__name__] = f"{type(error).__name__}: {error}"
    for command in life.commands():
        print(command)
    print(broken)
    assert not broken
