"""Answers through a server: those of the model in this process, whatever fails on the way; and what
is refused. The server plays vLLM's routes and makes its faults; tests/serving/test_vllm.py has the
real one."""

from dataclasses import replace

import pytest
from evaluated_runs import chat, contents, evaluate, read
from made_files import change_json
from played_vllm import playing_vllm

import cera_train.evaluation.server as server_module
from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.runs.subject import find_subject
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)


@pytest.fixture
def vllm(eval_config, monkeypatch):
    monkeypatch.setattr(server_module, "PAUSES", (0,) * 7)  # one answer may meet all faults
    with playing_vllm(find_subject(eval_config()).model) as server:
        yield server


@pytest.fixture
def served_config(eval_config, vllm):
    return lambda *overrides: eval_config(f"server={vllm.url}", *overrides)


STOP = 'task.stop=["e"]'  # a letter that its answers have


def test_a_server_that_fails_now_and_then_gives_the_answers_of_the_model_in_this_process(
    eval_config, served_config, vllm, run
):
    result = evaluate(eval_config(STOP, "name=here"))
    here = run / "eval" / "here"
    assert any(answer["tokens"] < 8 for answer in read(here / "generations.jsonl"))
    vllm.faults = ["503", "gone", "usage", "429", "aborted", "500", "broken", "half a refusal"]
    assert evaluate(served_config(STOP)) == result | {"task": "gsm8k"}
    assert contents(run / "eval" / "gsm8k") == contents(here)
    config = read_yaml(run / "eval" / "gsm8k" / "config.yaml")
    assert config["engine"] == "vllm 0.32.0"
    assert len(vllm.asked) == 8 + 7
    evaluate(served_config("generation=sample", "generation.samples=2", "name=sampled"))
    sampled = vllm.asked[15:]
    assert len({body["seed"] for body in sampled}) == len(sampled) == 16
    assert {body["repetition_penalty"] for body in vllm.asked} == {1}


def test_a_server_that_goes_away_gives_one_line_and_the_same_command_resumes(
    eval_config, served_config, vllm, run
):
    evaluate(eval_config("name=here"))
    vllm.faults = ["", "", ""] + ["503"] * 99
    with pytest.raises(UserError) as caught:
        evaluate(served_config())
    assert str(caught.value) == (
        f"server={vllm.url} is busy: 503 it is overloaded. Once it is back, the same command "
        f"resumes."
    )
    kept = read(run / "eval" / "gsm8k" / "generations.jsonl")
    vllm.faults = []
    vllm.asked = []
    vllm.loaded = {}
    evaluate(served_config())
    assert len(vllm.asked) == 8 - len(kept) > 0
    assert contents(run / "eval" / "gsm8k") == contents(run / "eval" / "here")


def test_a_model_whose_every_weight_was_trained_is_served_as_a_base(tiny_config, eval_config):
    trained = train(tiny_config("adapter=full", "adapter.r=null", "train.max_updates=1"))
    subject = find_subject(eval_config(run=trained["folder"]))
    with playing_vllm(replace(subject.model, path=str(subject.adapter))) as vllm:
        server = server_module.Server(vllm.url, subject.model, None, subject.adapter)
    assert server.name == "base"
    assert not vllm.loaded


def test_an_adapter_that_took_a_part_of_the_base_is_not_served(eval_config, vllm, run):
    """vLLM would add it to the whole base."""
    model = find_subject(eval_config()).model
    change_json(run / "adapter" / "adapter_config.json", {"init_lora_weights": "pissa"})
    with pytest.raises(UserError, match="of which pissa moved a part into .*adapter, so"):
        server_module.Server(vllm.url, model, None, run / "adapter")
    assert not vllm.loaded


REFUSALS = {
    "another base": (
        lambda vllm: vllm.served.update(root="org/other"),
        ["serves org/other, not ", "`vllm serve "],
    ),
    "no vLLM": (
        lambda vllm: vllm.refusals.update({"/version": (404, {"detail": "Not Found"})}),
        ["refuses /version: Not Found. Name the address of a vLLM."],
    ),
    "no loading": (
        lambda vllm: vllm.refusals.update({server_module.LOAD: (404, {"detail": "Not Found"})}),
        ["Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"],
    ),
    "no plugin": (
        lambda vllm: vllm.refusals.update(
            {server_module.LOAD: (500, {"detail": "'CeraConfig' has no 'lora_alpha'"})}
        ),
        ["Install cera-train where vLLM runs"],
    ),
    "another model": (
        lambda vllm: vllm.faults.append("another model"),
        ["asked for run-adapter-", "base answered"],
    ),
    "no log p": (
        lambda vllm: vllm.faults.append("no log p"),
        ["without token ids of its vocabulary or their log p (TypeError", "update"],
    ),
    "cut answers": (
        lambda vllm: vllm.faults.append("cut"),
        ["cuts answers at 1 of 8 tokens", "--generation-config"],
    ),
}


@pytest.mark.parametrize(("change", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_server_cannot_answer_is_one_line(served_config, vllm, change, parts):
    change(vllm)
    with pytest.raises(UserError) as caught:
        evaluate(served_config("task.limit=1"))
    assert f"server={vllm.url} " in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_chat_with_a_server_is_that_with_the_model_in_this_process(run, vllm, capsys):
    def answer(*settings: str) -> str:
        chat(run, "prompt=How many?", "max_new_tokens=8", *settings)
        return capsys.readouterr().out

    assert answer(f"server={vllm.url}/v1/") == answer() != ""
    vllm.faults = ["gone"]
    with pytest.raises(UserError, match="broke off an answer after 1 tokens"):
        answer(f"server={vllm.url}")
