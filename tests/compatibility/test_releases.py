"""What earlier releases left is read by this one: each archive holds the runs, the evaluation, the
export, the sweep and the study of a tiny model that `make corpus` made with that release."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_runs import losses_of
from torch.testing import assert_close

from cera_train.runs.evaluation_folder import find_evaluation_result
from cera_train.runs.records import load_config
from cera_train.settings.evaluation import EvalConfig, GenerationConfig

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.gz"))
assert ARCHIVES

ROUNDING = {"rtol": 1e-3, "atol": 1e-5}
"""Another processor, or another version of torch, sums in another order."""


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
def release(request, tmp_path, run_command) -> str:
    """A version, whose folders lie in the working folder."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return request.param.name.removesuffix(".tar.gz")


def command_of(run: Path) -> list[str]:
    return json.loads((run / "environment.json").read_text())["command"]


@pytest.mark.parametrize(
    "name", ["cera", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "dpo"))]
)
def test_a_run_resumes_from_its_checkpoint_to_the_same_adapter(release, run_command, name):
    run = Path("outputs") / name
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    losses = losses_of(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "8")

    assert run_command(*command_of(run)) == 0
    resumed = load_file(run / "adapter" / "adapter_model.safetensors")
    assert_close(resumed, adapter, **ROUNDING)
    assert losses_of(run) == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_run_answers_and_predicts_as_it_did(release, run_command):
    folder = Path("outputs/cera/eval")
    shutil.move(folder, "before")
    for task in ("held_out", "perplexity"):
        config = yaml.safe_load(Path("before", task, "config.yaml").read_text())
        room = f"task.max_new_tokens={config['task']['max_new_tokens']}"
        assert run_command("cera-eval", "run=outputs/cera", f"task={task}", room) == 0
    answers = "held_out/generations.jsonl"
    assert (folder / answers).read_text() == Path("before", answers).read_text()
    perplexity = "perplexity/result.json"
    before = json.loads(Path("before", perplexity).read_text())
    now = json.loads((folder / perplexity).read_text())
    assert now["perplexity"] == pytest.approx(before["perplexity"], rel=1e-5)


def test_an_evaluation_is_read(release):
    folder = Path("outputs/cera/eval/held_out")
    assert load_config(folder / "config.yaml", EvalConfig).generation == GenerationConfig()
    endings = {"right": 0, "wrong": 0, "loop": 0, "truncated": 1, "collapsed": 0}
    assert find_evaluation_result(folder).endings == endings


@pytest.mark.slow
def test_an_export_predicts_as_it_did(release, run_command):
    certificate = json.loads(Path("outputs/cera/export_lora/certificate.json").read_text())
    words = ["run=outputs/cera/export_lora", "task=perplexity", "data=jsonl"]
    rows = ["data.train_files=[rows.jsonl]", "data.eval_rows=8", "data.max_length=64"]
    base = ["model=smollm2_135m", "model.path=base", "model.dtype=float32"]
    assert run_command("cera-eval", *words, *rows, *base) == 0
    result = json.loads(Path("outputs/cera/export_lora/eval/perplexity/result.json").read_text())
    assert result["loss"] == pytest.approx(certificate["loss_form"], rel=1e-5)


@pytest.mark.slow
def test_a_study_has_the_verdicts_it_had(release, run_command):
    assert run_command("cera-report", "outputs/compared", "--output=again") == 0
    before, now = (
        json.loads(Path(folder, "study_results.json").read_text())["contrasts"]
        for folder in ("report", "again")
    )
    assert len(before) == len(now) > 0
    for old, new in zip(before, now, strict=True):
        old.pop("by_base", None)  # kept until 0.2.0
        assert old.items() <= new.items()


@pytest.mark.slow
def test_a_finished_sweep_has_nothing_to_run(release, run_command):
    command = json.loads(Path("outputs/sweep/sweep.json").read_text())["command"]
    results = {path: path.stat().st_mtime_ns for path in Path("outputs/sweep").rglob("result.json")}
    assert run_command(*command) == 0
    assert len(results) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())


def test_a_run_that_used_what_is_gone_is_refused_and_its_adapter_still_starts_another(
    release, run_command, capfd
):
    run = Path("outputs/cera")
    config = run / "config.yaml"
    recorded = config.read_text()
    command = command_of(run)
    config.write_text(f"{recorded}a_setting_of_then: 1\n")
    assert run_command("cera-eval", f"run={run}", "task=perplexity") == 2
    assert f"cannot read {config}: " in capfd.readouterr().err
    for before, now in (
        ("layout: text", "layout: reasoning_gym"),
        ("start_rows: 256", "start_rows: 8"),
        ("kind: cera\n", "kind: anneal\n"),
    ):
        assert before in recorded
        config.write_text(recorded.replace(before, now))
        assert run_command(*command) == 2
        error = capfd.readouterr().err
        assert re.search(rf"{config}: \S+: cera-train {release} was the last that had it: ", error)
    assert run_command(*command, f"adapter.start_from={run}", "name=again") == 0
