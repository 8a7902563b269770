"""Every mistake on a command line gets one line and status 2: the place, what is wrong, the mend."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys

import pytest
from commands import WITHOUT_TORCH, assert_one_line, cera_train, command
from hydra.errors import MissingConfigException

from cera_train.cli import evaluate, plan, report, sweep, train
from cera_train.cli.arguments import for_hydra
from cera_train.cli.composition import Composition
from cera_train.cli.names import USUAL_NAMES, did_you_mean
from cera_train.cli.train import TRAIN
from cera_train.common.errors import UserError
from cera_train.common.settings import keys_of
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config, PlanRun


@pytest.fixture
def refusal(tmp_path, monkeypatch, capfd):
    """refusal("cera-eval", "run=x", ...) -> the line of a command that ends with status 2, in this process."""
    commands = {"cera-train": train, "cera-eval": evaluate, "cera-plan": plan}
    commands |= {"cera-report": report, "cera-sweep": sweep}

    def refusal(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as exit_info:
            commands[name].main()
        assert exit_info.value.code == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    return refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # a name that does not exist: spelled otherwise, or as other programs have it
        (["adapter.rank=3"], r"adapter.rank=3: unknown setting adapter.rank. Did you mean adapter.r[?]"),
        (["train.lr=3"], "Did you mean optimizer.lr[?]"),
        (["batch_size=3"], "Did you mean train.batch_size[?]"),
        (["+train.batch=3"], r"\+train.batch=3: unknown setting train.batch. Did you mean train.batch_size"),
        (["adaptr=lora"], "adaptr=lora: unknown setting adaptr. Did you mean adapter[?]"),
        (["optimizer.learning_rate=1e-3"], "unknown setting optimizer.learning_rate. Did you mean optimizer.lr[?]"),
        (["max_steps=10"], "max_steps=10: .*Did you mean train.max_updates[?]"),
        (["gradient_accumulation_steps=4"], "Did you mean train.micro_batch_tokens[?] train.batch_size counts"),
        (["plan.gpus=4"], "plan.gpus=4: plan is a setting of cera-plan, not of cera-train"),
        (["task=math"], "task=math: task is a setting of cera-eval, not of cera-train"),
        # a file that does not exist, or a section without a file
        (
            ["model=llama3_1_8"],
            "model=llama3_1_8: unknown model 'llama3_1_8'. Did you mean llama3_1_8b.*There are: .*",
        ),
        (["+recipe=math_r6"], "recipe=math_r6: unknown recipe 'math_r6'. Did you mean math_r64.*There are: gsm8k_r64"),
        (["recipe=math_r64"], r"recipe=math_r64: .* write \+recipe=math_r64"),
        (["math_r64"], r"math_r64: .* write \+recipe=math_r64"),
        (["rank_lr"], r"rank_lr: .* write -m \+sweep=rank_lr"),
        (["+adapter=lora"], r"\+adapter=lora: .* without a plus sign: write adapter=lora"),
        (["+adapter.r=3"], r"\+adapter.r=3: .* no plus sign: write adapter.r=3"),
        (["model=null"], "model=null: expected the name of a file"),
        (["~model"], "~model: model cannot be left out"),
        (["train=3"], "train=3: train is a section: .* train.batch_size=VALUE"),
        (["hydra/launcher=slrum", "-m"], "hydra/launcher=slrum: unknown launcher 'slrum'"),
        (["--config-name", "mine"], "--config-name=mine: there is no such file"),
        (["-m", "+sweep=quickstart_grid", "--cfg", "job"], "--cfg shows one config: leave -m out"),
        (["--cfg=job", "-m"], "--cfg shows one config: leave -m out"),
        (["--info", "-m"], "--info shows one config: leave -m out"),
        # a value of a wrong kind
        (["adapter.r=abc"], "adapter.r=abc: expected a whole number"),
        (["adapter.r=null"], "adapter.r=null: adapter.kind=cera needs a rank, such as adapter.r=64"),
        (["train.epochs=1.5"], "train.epochs=1.5: expected a whole number"),
        (["train.compile=maybe"], "train.compile=maybe: expected true or false"),
        (["adapter.r=-1"], "adapter.r=-1 must be positive"),
        (["launch.processes=1000"], "launch.processes=1000: one machine runs at most 256"),
        (["adapter.kind=lorra"], r"adapter.kind=lorra: expected one of cera, .*lora.* Did you mean lora"),
        (["adapter.layers=3"], "adapter.layers=3: expected a list of whole numbers"),
        (["adapter.layers=[a]"], r"adapter.layers=\[a\]: expected a list of whole numbers"),
        (["adapter.alpha=${nothing}"], "adapter.alpha=[$]{nothing}: Interpolation key 'nothing' not found"),
        (["data.facts.train_rows=5", "data=jsonl"], "data.facts.train_rows=5: data.facts is null"),
        (["train.micro_batch_tokens=8"], "train.micro_batch_tokens=8 is less than data.max_length=128"),
        (["train.tasks=[gsm9k]"], r"train.tasks=\[gsm9k\]: there is no such task: choose from forgetting, gsm8k"),
        (["train.tasks=[math,math]"], "train.tasks names math twice"),
        (["train.tasks=[forgetting]"], r"train.tasks=\[forgetting\] has no answers to grade: leave it to cera-eval"),
        (["train.tasks_every=100"], r"train.tasks_every=100 without train.tasks: name a task, such as \[gsm8k\]"),
        (["train.tasks=[math]", "train.tasks_every=150"], "train.tasks_every=150 must be a multiple of train.eval_e"),
        (["train.tasks=[math]", "train.tasks_limit=0"], "train.tasks_limit=0 must be positive"),
        (["train.task_settings={math: {limit: 5}}"], "train.task_settings.math=.*: math is not in train.tasks: add it"),
        (["train.tasks=[math]", "train.task_settings={math: 5}"], "train.task_settings.math=5: expected names and val"),
        (["train.tasks=[math]", "train.task_settings={math: {fils: [a]}}"], "train.task_settings.math: Key 'fils' not"),
        (
            ["train.tasks=[math]", "train.task_settings={math: {files: [no.jsonl]}}"],
            r"train.tasks=\[math\]: task.files=no.jsonl: cannot read the file",
        ),
        (["train.task_settings=5"], "train.task_settings=5: expected names and values, like {gsm8k: {limit: 100}}"),
        (["train.samples=-1"], "train.samples=-1 must not be negative"),
        (["train.samples=1", "distributed.strategy=fsdp"], "train.tasks and train.samples generate answers, and shard"),
        (["data=jsonl"], "there is no training data: set data.train_files"),
        ([f"name={'x' * 300}"], "300 bytes are too long for a folder"),
        ([f"output_dir={'x' * 300}"], "too long for the name of a file or folder"),
        # in a part of a mix
        (
            ["data.mix=[{fiels:[a]}]"],
            r"data.mix=\[{fiels:\[a\]}\]: unknown setting .* data.mix.N.files",
        ),
        (["data.mix=[{weight:a}]"], r"data.mix=\[{weight:a}\]: expected a number, or null"),
        (["data.mix=[a.jsonl]"], r"data.mix=\[a.jsonl\]: expected a list of {weight, path, .*, loss_on}, or null"),
        (["data.mix.0.wieght=3"], "data.mix.0.wieght=3: unknown setting .* Did you mean data.mix.0.weight"),
        (["data=jsonl", "data.mix=[{files:[no.jsonl],eval_rows:1}]"], "data.mix.0.files=no.jsonl: cannot read the fi"),
        # an argument of a wrong form
        (["adapter.r=["], r"adapter.r=\[: cannot read the value.*'adapter.r=\"\[\"'"),
        (["data.prompt=Q: {question}"], "cannot read the value.*'data.prompt=\"Q: {question}\"'"),
        (["data.prompt=Q:", "{question}"], "{question}: expected key=value.*quote the whole argument"),
        (["adapter.r="], "adapter.r=: the value is missing: write adapter.r=VALUE"),
        (["adapter.r", "4"], "adapter.r 4: .* write adapter.r=4"),
        (["adapter.r=", "4"], "adapter.r= 4: .* write adapter.r=4"),
        (["--adapter.r", "4"], "--adapter.r: settings take no dashes: write adapter.r=4"),
        (["--adapter.r=4"], "--adapter.r=4: settings take no dashes: write adapter.r=4"),
        (["--multrun"], "--multrun: unknown option. Did you mean --multirun"),
        (["--cfg", "jobs"], "--cfg jobs: expected one of job, hydra, all"),
        ([""], "'': an empty argument"),
        (["=3"], "=3: the key is missing"),
        (["adapter=lora", "adapter=dora"], "adapter=dora: adapter is chosen twice, by adapter=lora too"),
        # several values
        (["adapter.r=4,8"], "adapter.r=4,8: several values for one run: add -m"),
        (["adapter.target_modules=q,v"], r"write 'adapter.target_modules=\[q,v\]' for a list, or add -m"),
        (["data.subset=a,b"], "add -m for a run each, or quote a text with a comma: 'data.subset=\"a,b\"'"),
    ],
)
def test_a_mistaken_setting_gets_one_line_and_status_2(tmp_path, refusal, arguments, message):
    line = refusal("cera-train", *arguments)
    assert re.match(f"cera-train: .*{message}", line), line
    assert not list(tmp_path.iterdir())


def test_a_task_on_rows_without_answers_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n{"question": "2 + 2"}\n')
    settings = ["train.tasks=[gsm8k]", "train.task_settings={gsm8k: {files: [rows.jsonl]}}"]
    done = cera_train(*settings, cwd=tmp_path, **WITHOUT_TORCH)
    assert_one_line(done, "cera-train", r"train.tasks=\[gsm8k\]: rows.jsonl:2: column 'answer' is missing")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.r=-1"], "adapter.r=-1 must be positive"),
        (["optimizer.learning_rate=1e-3"], "Did you mean optimizer.lr"),
        (["-m", "+sweep=rank_lr", "adapter=cera,lorra"], "adapter=lorra: unknown adapter"),
        (["-m", "adapter.r=range(1,40)", "train.seed=range(1,40)", "model.path=./no"], "model.path=./no: folder does"),
    ],
)
def test_a_mistake_is_answered_without_torch(tmp_path, arguments, message):
    done = cera_train(*arguments, cwd=tmp_path, **WITHOUT_TORCH)
    assert_one_line(done, "cera-train", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "quantisation: nf4",
            "model/mine.yaml: unknown setting model.quantisation. Did you mean model.quant",
        ),
        ("dtype: bf16", "model/mine.yaml: model.dtype=bf16: expected one of auto, bfloat16"),
        ("path: a: b", "model/mine.yaml:1: broken YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, refusal, content, message):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(content)
    line = refusal("cera-train", "--config-dir", "conf", "model=mine", "name=run")
    assert re.match(f"cera-train: .*{message}", line), line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cera-eval", ["run=x"], "task=... is missing: `cera-eval --help` lists the tasks"),
        ("cera-eval", ["run=x", "task=maths"], "unknown task 'maths'. Did you mean math"),
        ("cera-eval", ["run=x", "tsk=math"], "tsk=math: unknown setting tsk. Did you mean task[?] `cera-eval --help`"),
        (
            "cera-eval",
            ["run=x", "task=math", "adapter=lora"],
            "adapter=lora: adapter is a setting of cera-train",
        ),
        ("cera-eval", ["run=x", "task.limit=4"], "task.limit needs a file for task: add task=NAME, one of forgetting"),
        ("cera-eval", ["run=x", "task=math", "model.dtype=float32"], "model.dtype needs a file for model"),
        ("cera-eval", ["run=base", "task=math"], "run=base needs model="),
        ("cera-eval", ["run=base", "task=perplexity", "model=smollm2_135m"], "needs data=..."),
        ("cera-eval", ["run=x", "task=math", "data=math"], "data=... belongs to task=perplexity"),
        ("cera-eval", ["run=x", "task=math", "task.limit=0"], "task.limit=0 must be positive"),
        ("cera-eval", ["run=x", "task=math", "generation.top_p=0.9"], "no meaning for greedy answers"),
        ("cera-eval", ["run=x", "task=math", "generation=sample", "generation.top_p=0"], "must be above 0"),
        ("cera-eval", ["run=x", "task=logistic_map", "task.growths=[5]"], "must be numbers above 0"),
        ("cera-eval", ["run=x", "task=math", "task.name=../out"], "expected the name of one folder"),
        ("cera-eval", ["run=x", "task=gsm8k", "task.level=5"], "task.level=5 is for MATH's and reasoning-gym's tasks"),
        ("cera-eval", ["run=x", "task=logistic_map", "task.files=[x.jsonl]"], "takes neither task.prompt nor"),
        ("cera-eval", ["run=x", "task=logistic_map", "task.growths=[3.5699456]"], "more than the six digits"),
        ("cera-eval", ["run=x", "task=forgetting", "task.window=1"], "task.window=1 must be at least 2"),
        ("cera-eval", ["outputs", "task=math"], "outputs: expected key=value"),
        ("cera-eval", [".", "task=math"], "[.]: expected key=value: write run=[.]"),
        ("cera-eval", [f"run={'x' * 300}", "task=math"], "too long for the name of a file or folder"),
        ("cera-plan", ["-m", "optimizer.lr=interval(1,2)"], "needs a sweeper that draws"),
        ("cera-report", ["nothing"], "nothing is not a folder: expected"),
        ("cera-report", [], "the following arguments are required: DIR"),
        ("cera-sweep", ["nothing"], "nothing is not a folder: expected"),
        ("cera-eval", ["grade=x", "task=math"], "grade=... takes neither run= nor task="),
    ],
)
def test_a_mistake_in_another_command_gets_one_line_and_status_2(tmp_path, refusal, name, arguments, message):
    line = refusal(name, *arguments)
    assert re.match(f"{name}: .*{message}", line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cera-eval", [], r"run=... is missing: the folder of a run"),
        ("cera-eval", ["run=x", "task=math", "generation.samples=4"], "choose generation=sample"),
        ("cera-plan", ["plan.gpu=h1000"], "plan.gpu=h1000: expected one of h100, .*Did you mean h100"),
    ],
)
def test_another_command_answers_a_mistake_without_torch(tmp_path, name, arguments, message):
    done = command(name, *arguments, cwd=tmp_path, **WITHOUT_TORCH)
    assert_one_line(done, name, message)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_a_folder_that_is_no_run_gets_one_line(tmp_path):
    done = command("cera-eval", "run=nothing", "task=gsm8k", cwd=tmp_path, **WITHOUT_TORCH)
    assert_one_line(done, "cera-eval", "run=nothing does not exist: expected a folder that cera-train left")
    assert not list(tmp_path.iterdir())


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

    monkeypatch.setattr("cera_train.evaluation.launch.launch", launch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cera-eval", *arguments])
    with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit, match=f"^{status}$"):
        evaluate.main()
    assert begun == evaluated
    assert capfd.readouterr().err == ("cera-eval: broken is no evaluation.\n" if status else "")
    assert not list(tmp_path.iterdir())


def test_a_report_is_not_written_over_a_file(tmp_path):
    (tmp_path / "report").write_text("mine")
    assert_one_line(command("cera-report", ".", cwd=tmp_path), "cera-report", "--output=report: it is a file")


@pytest.mark.parametrize(
    "arguments",
    [["-m", "adapter.r=4,5", "name=x"], ["adapter.r=4,5", "-m", "name=x"], ["adapter.r=4,5", "name=x", "--multirun"]],
)
def test_flags_stand_anywhere(arguments):
    assert for_hydra(TRAIN, arguments)[1:] == ["adapter.r=4,5", "name=x"]


def test_what_peft_alone_knows_is_set_by_a_key_below_the_free_form_setting():
    for arguments in (["adapter=pissa", "adapter.settings.bias=all"], ["adapter=miss", "+adapter.settings.mini_r=2"]):
        assert for_hydra(TRAIN, arguments) == arguments
    with pytest.raises(UserError, match="adapter.r.x=2: unknown setting adapter.r.x"):
        for_hydra(TRAIN, ["adapter.r.x=2"])


def test_without_arguments_the_quickstart_runs():
    assert for_hydra(TRAIN, []) == for_hydra(TRAIN, ["--debug"]) == ["+recipe=quickstart"]
    assert for_hydra(TRAIN, ["name=mine"]) == ["name=mine"]
    assert for_hydra(TRAIN, ["adapter.r=4", "adapter.r=8", "adapter.r=4"])[-1] == "adapter.r=4"  # the last holds
    assert for_hydra(TRAIN, ["--help"]) == ["--help"]
    assert for_hydra(Composition(PlanRun, "cera-plan"), []) == []


@pytest.mark.parametrize("file", ["hydra/launcher/submitit_slurm", "hydra/sweeper/optuna"])
def test_a_plugin_that_is_not_installed_is_named(file):
    line = TRAIN.explain(MissingConfigException("", file, []), ["-m", "hydra/launcher=slurm_gpu"])
    assert "needs a plugin that is not installed: pip install " in line


def test_every_usual_name_leads_to_a_setting_that_exists():
    known = [name for schema in (Config, EvalConfig) for name in [*Composition(schema).groups(), *keys_of(schema)]]
    for ours, names in USUAL_NAMES.items():
        assert ours.partition("=")[0] in known
        for name in names:
            assert did_you_mean(name, known).startswith(f"Did you mean {ours}? "), name


def test_warnings_of_libraries_stand_before_no_error(tmp_path):
    script = (
        "import sys, warnings; sys.argv = ['cera-report', 'nothing']\n"
        "from cera_train.cli import report\n"
        "refuse = report.refuse_arguments\n"
        "report.refuse_arguments = lambda program: warnings.warn('of a library') or refuse(program)\n"
        "report.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert_one_line(done, "cera-report", "nothing is not a folder")
