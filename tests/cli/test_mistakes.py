"""Every mistake on a command line gets one line and status 2: the place, what is wrong, the mend."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module

import pytest
from commands import WITHOUT_TORCH, command

from cera_train.cli import evaluate
from cera_train.cli.mistakes import SCHEMAS, USUAL_NAMES, did_you_mean, for_hydra
from cera_train.common.errors import UserError
from cera_train.common.settings import keys_of
from cera_train.settings.evaluation import EvalConfig

MODULES = {"cera-eval": "evaluate"}

MISTAKES = [
    # a name that does not exist: spelled otherwise, or as other programs have it
    ("cera-train adapter.rank=3", "adapter.rank=3: unknown setting", "Did you mean adapter.r?"),
    ("cera-train +train.batch=3", "+train.batch=3: unknown setting", "Did you mean train.batch_size?"),
    ("cera-train optimizer.learning_rate=1e-3", "unknown setting optimizer.learning_rate", "mean optimizer.lr?"),
    ("cera-train gradient_accumulation_steps=4", "unknown setting", "Did you mean train.micro_batch_tokens?"),
    ("cera-train plan.gpus=4", "plan.gpus=4: plan is a setting of cera-plan", "Leave it out."),
    ("cera-train task=math", "task=math: task is a setting of cera-eval", "Leave it out."),
    ("cera-eval run=x tsk=math", "tsk=math: unknown setting tsk", "Did you mean task?"),
    # a file that does not exist, or a section without a file
    ("cera-train model=llama3_1_8", "model=llama3_1_8: there is no such file", "Did you mean llama3_1_8b?"),
    ("cera-train +recipe=math_r6", "recipe=math_r6: there is no such file", "Did you mean math_r64?"),
    ("cera-train hydra/launcher=slrum -m", "hydra/launcher=slrum: there is no such file", "slurm_gpu"),
    ("cera-train -m +sweep=rank_lr adapter=cera,lorra", "adapter=lorra: there is no such file", "mean lora?"),
    ("cera-train recipe=math_r64", "recipe=math_r64: a recipe is added with a plus sign", "write +recipe=math_r64"),
    ("cera-train math_r64", "math_r64: expected key=value", "write +recipe=math_r64"),
    ("cera-train rank_lr", "rank_lr: expected key=value", "write -m +sweep=rank_lr"),
    ("cera-train +adapter=lora", "+adapter=lora: a file of adapter is chosen without a plus", "write adapter=lora"),
    ("cera-train +adapter.r=3", "already at 'adapter.r'", "remove + prefix"),
    ("cera-train ~model", "~model", "missing mandatory value: model"),
    ("cera-train model=null", "group override must be a string", ""),
    ("cera-eval run=x task.limit=4", "task.limit: task is null here", "choose a file for it, task=NAME"),
    # a value of a wrong kind
    ("cera-train adapter.r=abc", "adapter.r=abc: ", "could not be converted to Integer"),
    ("cera-train train.epochs=1.5", "train.epochs=1.5: ", "could not be converted to Integer"),
    ("cera-train adapter.kind=lorra", "adapter.kind=lorra: ", "expected one of [cera, dora"),
    ("cera-plan plan.gpu=h1000", "plan.gpu=h1000: ", "expected one of [h100, a100"),
    ("cera-train adapter.layers=[a]", "adapter.layers[0]=a: ", "could not be converted to Integer"),
    ("cera-train adapter.alpha=${nothing}", "adapter.alpha=${nothing}: ", "'nothing' not found"),
    ("cera-train data.mix=[{fiels:[a]}]", "data.mix=[{fiels:[a]}]: ", "unknown setting fiels"),
    # a value that makes no sense
    ("cera-train adapter.r=-1", "adapter.r=-1 ", "must be positive"),
    ("cera-train adapter.r=null", "adapter.r=null: ", "needs a rank, such as adapter.r=64"),
    ("cera-train train.micro_batch_tokens=8", "train.micro_batch_tokens=8 ", "less than data.max_length=128"),
    ("cera-train train.tasks=[gsm9k]", "train.tasks=[gsm9k]: there is no such task", "choose from forgetting, gsm8k"),
    ("cera-train train.tasks_every=100", "train.tasks_every=100 without train.tasks", "name a task"),
    ("cera-train data=jsonl", "there is no training data", "set data.train_files"),
    ("cera-train launch.processes=1000", "launch.processes=1000", "at most 256"),
    ("cera-train model.path=./no", "model.path=./no: ", "folder does not exist"),
    ("cera-train output_dir=" + "x" * 300, "xxx...: too long for the name of a file", "Shorten it."),
    ("cera-eval", "run=... is missing", "the folder of a run"),
    ("cera-eval run=x", "task=... is missing", "`cera-eval --help` lists the tasks"),
    ("cera-eval run=nothing task=gsm8k", "run=nothing does not exist", "a folder that cera-train left"),
    ("cera-eval run=x task=math generation.samples=4", "generation.samples=4", "choose generation=sample"),
    # an argument of a wrong form
    ("cera-train adapter.r=[", "adapter.r=[: cannot read the value", """'adapter.r="["'"""),
    ("cera-train adapter.r=", "adapter.r=: expected key=value", "write adapter.r=VALUE"),
    ("cera-train adapter.r 4", "adapter.r: expected key=value", "write adapter.r=VALUE without spaces"),
    ("cera-train --adapter.r 4", "--adapter.r: unknown option", "settings take no dashes"),
    ("cera-train --cfg jobs", "--cfg", "choose from"),
    ("cera-train -m +sweep=quickstart_grid --cfg job", "--cfg=job shows one config", "leave -m out"),
    ("cera-eval . task=math", ".: expected key=value", "write run=."),
    ("cera-train adapter.r=4,8", "'adapter.r=4,8'", "add --multirun"),
    ("cera-plan -m optimizer.lr=interval(1,2)", "a grid takes single values", "hydra/sweeper=optuna"),
    ("cera-report nothing", "nothing is not a folder", "expected"),
    ("cera-report", "arguments are required: DIR", "see cera-report --help"),
    ("cera-sweep nothing", "nothing is not a folder", "expected"),
]


@pytest.mark.parametrize(("line", "cause", "mend"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_gets_one_line_and_status_2(tmp_path, monkeypatch, capfd, line, cause, mend):
    program, *arguments = line.split(" ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        import_module(f"cera_train.cli.{MODULES.get(program, program.removeprefix('cera-'))}").main()
    (printed,) = capfd.readouterr().err.splitlines()
    assert printed.startswith(f"{program}: ")
    assert cause in printed
    assert mend in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cera-train", ["adapter.r=-1"], "adapter.r=-1 must be positive"),
        ("cera-train", ["-m", "adapter.r=range(1,40)", "train.seed=range(1,40)", "model.path=./no"], "model.path=./no"),
        (
            "cera-train",
            ["train.tasks=[gsm8k]", "train.task_settings={gsm8k: {files: [rows.jsonl]}}"],
            "rows.jsonl:2: ",
        ),
        ("cera-eval", ["run=nothing", "task=gsm8k"], "run=nothing does not exist"),
        ("cera-plan", ["plan.gpu=h1000"], "plan.gpu=h1000: "),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(tmp_path, name, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n{"question": "2 + 2"}\n')
    done = command(name, *arguments, cwd=tmp_path, **WITHOUT_TORCH)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("quantisation: nf4", "model/mine.yaml: model.quantisation: unknown setting"),
        ("dtype: bf16", "model/mine.yaml: model.dtype: Invalid value 'bf16'"),
        ("path: a: b", "model/mine.yaml:1: broken YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, content, message):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(content)
    done = command("cera-train", "--config-dir", "conf", "model=mine", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "evaluated"),
    [
        (["-m", "grade=broken,b"], 1, ["broken", "b"]),
        (["-m", "grade=a,b"], 0, ["a", "b"]),
        (["grade=broken"], 2, ["broken"]),
    ],
)
def test_an_evaluation_that_fails_lets_the_others_run(tmp_path, monkeypatch, capfd, arguments, status, evaluated):
    begun = []

    def launch(config: EvalConfig) -> None:
        begun.append(config.grade)
        if config.grade == "broken":
            raise UserError("broken is no evaluation.")

    monkeypatch.setattr("cera_train.evaluation.evaluate.launch", launch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cera-eval", *arguments])
    with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit, match=f"^{status}$"):
        evaluate.main()
    assert begun == evaluated
    assert capfd.readouterr().err == ("cera-eval: broken is no evaluation.\n" if status else "")
    assert not list(tmp_path.iterdir())


def test_flags_stand_anywhere_and_without_arguments_the_quickstart_runs():
    for arguments in (["-m", "adapter.r=4,5", "name=x"], ["adapter.r=4,5", "--debug", "name=x", "--multirun"]):
        assert for_hydra("cera-train", arguments) == ["--multirun", "adapter.r=4,5", "name=x"]
    assert for_hydra("cera-train", []) == for_hydra("cera-train", ["--debug"]) == ["+recipe=quickstart"]
    assert for_hydra("cera-train", ["--help"]) == ["--help"]
    assert for_hydra("cera-plan", []) == []


def test_every_usual_name_leads_to_a_setting_that_exists():
    known = [name for schema in SCHEMAS.values() for name in [*vars(schema)["__annotations__"], *keys_of(schema)]]
    for row in USUAL_NAMES.strip().splitlines():
        ours, *names = row.split()
        assert ours.partition("=")[0] in known
        assert all(did_you_mean(name, known) == f"Did you mean {ours}? " for name in names), row
