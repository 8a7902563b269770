"""A method from outside PEFT, by import path, from the command line alone."""

import json

import pytest
from conftest import TINY
from several_processes import cut_copy
from tiny_runs import adapter_bytes, losses_of, run_card

METHOD = "outside_tuner.ScaleConfig"


@pytest.fixture
def words(tiny_folder) -> list[str]:
    return [
        f"model.path={tiny_folder}",
        *TINY,
        "adapter=peft",
        f"adapter.method={METHOD}",
        "optimizer.lr=1e-2",
        "train.max_updates=4",
        "train.eval_every=4",
        "train.save_every=2",
    ]


def test_it_trains_resumes_and_is_evaluated_by_whom_trusts_it(words, run_command, tmp_path, capsys):
    assert run_command("cera-train", *words, "name=outside") == 0
    trusting = "run=outputs/outside trust_remote_code=true"
    assert f"cera-chat {trusting}\n" in capsys.readouterr().out
    run = tmp_path / "outputs" / "outside"
    losses = losses_of(run)
    assert losses[-1] < losses[0]
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "OUTSIDE"
    assert "\nimport outside_tuner  # registers" in (run / "adapter" / "README.md").read_text()
    assert run_card(run / "adapter")["model"].peft_type == "OUTSIDE"

    cut_copy(run, run.with_name("cut"), 2)
    assert run_command("cera-train", *words, "name=cut") == 0
    assert adapter_bytes(run.with_name("cut")) == adapter_bytes(run)

    evaluation = ["cera-eval", f"run={run}", "task=logistic_map", "task.limit=1"]
    capsys.readouterr()
    assert run_command(*evaluation) == 2
    assert f"adapter.method={METHOD}. If you trust that code, set trust_remote_code=true" in (
        capsys.readouterr().err
    )
    assert run_command(*evaluation, "trust_remote_code=true", "task.max_new_tokens=4") == 0
