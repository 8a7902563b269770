"""Answers of a server by another policy than the model's are refused; sound answers pass. A played
server makes the mistakes; tests/serving has those of a real vLLM."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from built_runs import BuiltRun, build_run
from made_files import change_json, write_lines
from played_vllm import playing_vllm

from cera_train.common.errors import UserError
from cera_train.evaluation.server import Server
from cera_train.settings.run import Config
from cera_train.training.objectives.policy import (
    DISTANCE,
    LIMIT,
    MOST_ROUNDING,
    log_p_distance,
)

Change = Callable[[Path], None]
"""Of the folder of an adapter."""

WORDS = ("one", "two", "six", "ten")
ROWS = [{"prompt": f"Say {word}:", "completion": f" {word}"} for word in WORDS]


# --- the distance ---------------------------------------------------------------------------------


def test_one_token_of_any_log_p_adds_at_most_one_nat():
    here = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    assert log_p_distance(here, [[-1.0], [-2.5, -2.5, -9999.0]]) == 0.5
    assert log_p_distance(here, [[math.nan] * 4]) == 1


# --- mistakes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_of(tiny_config_in, tmp_path_factory):
    """config_of("adapter=lora", ...): the config of a run by rewards, with an adapter at r = 8."""
    folder = tmp_path_factory.mktemp("policy")
    rows = write_lines(folder / "rows.jsonl", ROWS)
    words = [
        "data=jsonl",
        f"data.train_files=[{rows}]",
        "data.eval_rows=1",
        "train.objective=grpo",
        "grpo.answers=2",
        "grpo.max_new_tokens=8",
        "adapter.r=8",
        "adapter.alpha=8",
        "adapter.target_modules=all-linear",
    ]
    return lambda *overrides: tiny_config_in(folder, *words, *overrides)


@pytest.fixture(scope="module")
def vllm(config_of):
    with playing_vllm(config_of().model) as vllm:
        yield vllm


def build(config: Config) -> BuiltRun:
    return build_run(config, Path(config.output_dir) / config.name)


@pytest.fixture(scope="module")
def run(config_of, vllm) -> BuiltRun:
    """A run whose adapter matters, and whose answers `vllm` samples."""
    run = build(config_of("adapter.dropout=0.3", f"train.server={vllm.url}"))
    torch.manual_seed(0)
    run.move(0.2)
    return run


def draw(run: BuiltRun) -> dict[str, float]:
    """Figures of answers by the adapter that the server is given now."""
    run.evaluator.sampler.served_update = None
    return run.objective.draw([0, 1, 2]).figures


ANOTHER = "answers by another policy than the adapter in training: its log p are"


@pytest.fixture
def change_adapters(monkeypatch) -> Callable[[Change], None]:
    """change_adapters(change): servers load changed copies of the adapters that they are to
    load."""
    load_adapter = Server.load_adapter

    def change_adapters(change: Change) -> None:
        def load_changed(server: Server, adapter: Path) -> None:
            copy = adapter.with_name("changed")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(adapter, copy)
            change(copy)
            load_adapter(server, copy)

        monkeypatch.setattr(Server, "load_adapter", load_changed)

    return change_adapters


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 4.0}, {"activation": "identity"}],
    ids=["half the scale", "no gate"],
)
def test_answers_by_a_wrong_adapter_are_refused(run, change_adapters, settings):
    figures = draw(run)
    assert figures[DISTANCE] < figures[LIMIT] / 10
    change_adapters(lambda folder: change_json(folder / "adapter_config.json", settings))
    with pytest.raises(UserError, match=ANOTHER):
        draw(run)


def test_answers_by_the_adapter_of_the_update_before_are_refused(run, change_adapters):
    loads = []

    def load_the_one_before(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        loads.append(file.read_bytes())
        file.write_bytes(loads[-2:][0])

    change_adapters(load_the_one_before)
    draw(run)
    run.move(0.01)
    with pytest.raises(UserError, match=ANOTHER):
        draw(run)


def test_answers_at_another_temperature_are_refused(run, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "temperature", 0.5)
    with pytest.raises(UserError, match=ANOTHER):
        draw(run)


def test_answers_by_another_base_are_refused(run, vllm, monkeypatch):
    monkeypatch.setattr(run.objective.policy, "limit", None)
    head = vllm.unadapted.get_output_embeddings().weight
    monkeypatch.setattr(head, "data", head + 0.1 * torch.randn_like(head))
    with pytest.raises(UserError, match="another policy than the base without an adapter"):
        draw(run)


# --- the limit ------------------------------------------------------------------------------------


def test_four_times_the_distance_of_the_base_is_accepted(run, vllm, monkeypatch):
    answer = vllm.answer

    def rounded(body: dict) -> tuple[list[int], dict[str, list], str]:
        tokens, logprobs, reason = answer(body)
        if body["model"] == "base":
            sent = logprobs["token_logprobs"]
            logprobs["token_logprobs"] = [p + 0.01 * (-1) ** n for n, p in enumerate(sent)]
        return tokens, logprobs, reason

    monkeypatch.setattr(vllm, "answer", rounded)
    monkeypatch.setattr(run.objective.policy, "limit", None)
    assert draw(run)[LIMIT] == pytest.approx(0.04, rel=1e-3)


def test_an_adapter_that_moves_the_base_has_a_limit_of_its_own(config_of, vllm):
    """Its base without it is none that a server has."""
    run = build(config_of("adapter=pissa", "name=pissa", f"train.server={vllm.url}"))
    assert run.objective.policy.limit == MOST_ROUNDING
