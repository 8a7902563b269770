"""Every mistake on a command line gets one line and status 2: the place, what is wrong, the
fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
import yaml
from commands import WITHOUT_TORCH, command
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from cera_train.cli.compose import compose
from cera_train.cli.mistakes import SCHEMAS, USUAL_NAMES, did_you_mean, for_hydra
from cera_train.common.errors import UserError
from cera_train.common.settings import fields_of, quoted

MISTAKES = [
    (
        "cera-train train.tasks=[gsm8k] train.tasks_every=5 train.eval_every=null",
        "a multiple of train.eval_every=null",
        "set one of the two",
    ),
    # a name that does not exist: spelled otherwise, or as other programs have it
    ("cera-train adapter.rank=3", "unknown setting adapter.rank", "Did you mean adapter.r?"),
    # a file that does not exist, or a section without a file
    (
        "cera-train model=llama3_1_8",
        "model=llama3_1_8: there is no such file",
        "Did you mean llama3_1_8b?",
    ),
    ("cera-train +adapter.r=3", "already at 'adapter.r'", "remove + prefix"),
    # what an earlier release had
    ("cera-train adapter=cera_gated", "cera-train 0.2.0 was the last", "choose cera"),
    ("cera-train data.layout=reasoning_gym", "cera-train 0.2.0 was the last", "write its quest"),
    (
        "cera-eval run=x task.limit=4",
        "task.limit=4: the section task is null",
        "choose a file for it, task=NAME",
    ),
    # a value of a wrong kind
    ("cera-train data.train_files=a.jsonl", "data.train_files=a.jsonl", "str is not a List"),
    ("cera-train adapter.r=abc", "adapter.r=abc", "could not be converted to Integer"),
    ("cera-plan plan.gpu=h1000", "plan.gpu=h1000", "expected one of [h100, a100"),
    (
        "cera-plan data.max_length=9000 train.micro_batch_tokens=9000",
        "9000 is beyond the 8192 positions",
        "data.",
    ),
    # a setting that nothing reads
    ("cera-train dpo.beta=0.5", "dpo.beta=0.5 does nothing here", "for train.objective=dpo. Leave"),
    ("cera-plan distributed.timeout=60", "does nothing here", "for cera-train, "),
    # a value that makes no sense
    ("cera-train data.facts.of=a", "inside a section that is null", "as a whole"),
    (
        "cera-train data.mix=[{train_files:[a.jsonl],wieght:1}]",
        "override 'data.mix'",
        "setting wieght",
    ),
    ("cera-train adapter.r=-1", "adapter.r=-1: ", "should be greater than 0"),
    (
        "cera-train train.tasks=[gsm9k]",
        "train.tasks=[gsm9k]: there is no such task",
        "choose from forgetting, gsm8k",
    ),
    ("cera-train data=jsonl", "there is no training data", "set data.train_files"),
    ("cera-train model.path=./no", "model.path=./no: ", "folder does not exist"),
    (
        "cera-eval run=base task=gsm8k",
        "run=base needs model.path=FOLDER, model=NAME",
        "or like=RUN",
    ),
    ("cera-train model.path=/proc/version", "it is a file", "Set model.path to a folder"),
    (
        "cera-train output_dir=" + "x" * 300,
        "xxx...: too long for the name of a file",
        "Shorten it.",
    ),
    ("cera-eval run=x", "task=... is missing", "`cera-eval --help` lists the tasks"),
    (
        "cera-eval run=x task=gsm8k server=localhost:8000",
        "server=localhost:8000: ",
        "string should match pattern '^https?://",
    ),
    ("cera-export run=x server=http://a", "server=http://a serves a folder", "set check=RUN/"),
    ("cera-export run=x like=y", "like=y belongs to run=base", "leave it out"),
    (
        "cera-eval run=x data=gsm8k task=gsm8k",
        "data=... belongs to task=perplexity",
        "task=gsm8k --help",
    ),
    (
        "cera-eval run=x task=perplexity server=http://a",
        "task=perplexity measures losses",
        "leave out server=",
    ),
    (
        "cera-eval run=x task=gsm8k server=http://a launch.processes=2",
        "launch.processes=2: one",
        "Leave one of the",
    ),
    (
        "cera-train -m +study=first_look study.arm=nope",
        "study.arm=nope: no such arm",
        "from lora, identity, cera",
    ),
    (
        "cera-train --look train.objective=grpo data=finewiki",
        "train.objective=grpo answers prompts",
        "rows with a prompt and an answer",
    ),
    (
        "cera-train train.objective=dpo",
        "train.objective=dpo learns from preferences",
        "set data.rejected",
    ),
    # code that is missing
    (
        "cera-train train.objective=grpo grpo.rewards=[math.pi]",
        "grpo.rewards=[math.pi] is a float, not a function",
        "Write module.function",
    ),
    (
        "cera-train tracker.kinds={swanlab:null}",
        "tracker.kinds={swanlab: ...}: no such tracker is here",
        "install its package",
    ),
    # an argument of a wrong form
    ("cera-train adapter.r=[", "adapter.r=[: cannot read the value", "quotes for Hydra too"),
    ("cera-train +recipe=sft +recipe=quickstart", "Multiple values for recipe", "override"),
    ("cera-train adapter.r 4", "adapter.r: expected key=value", "without spaces"),
    ("cera-train --adapter.r 4", "--adapter.r: unknown option", "settings take no dashes"),
    ("cera-train adapter.r=4,8", "adapter.r=4,8", "add --multirun to your command"),
    ("cera-train +sweep=rank_lr", "+sweep=rank_lr is for a grid", "add -m"),
    ("cera-train -m --look adapter.r=4,8", "--look: it shows the rows of one run", "leave out -m"),
    (
        "cera-eval run=base model.path=m task=gsm8k task.name=../../evil",
        "task.name=../../evil: ",
        "the name of one folder",
    ),
    # a sweep with an impossible value
    ("cera-train -m adapter.r=4,8 train.batch_size=16,0", "train.batch_size=0", "greater than 0"),
    (
        "cera-train -m adapter.r=4,8 sweep.metric=gsm8k/exact",
        "no job has this figure",
        "add train.tasks=[gsm8k].",
    ),
    (
        "cera-train -m adapter.r=4,8 launch.detach=true",
        "launch.detach=true is for jobs",
        "that run elsewhere",
    ),
    (
        "cera-train -m adapter.r=2,4 name=r${adapter.r}",
        "name=... is the folder of all jobs",
        "name=",
    ),
    ("cera-train -m output_dir=a,b", "output_dir=a,b is another for each job", "output_dir"),
    ("cera-plan --look", "--look: unknown option", "see cera-plan --help"),
    (
        "cera-plan -m optimizer.lr=interval(1,2)",
        "a grid takes single values",
        "hydra/sweeper=optuna",
    ),
    ("cera-report nothing", "nothing does not exist", "expected"),
    ("cera-report", "arguments are required: PATH", "see cera-report --help"),
]


@pytest.mark.parametrize(("line", "cause", "fix"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_gets_one_line_and_status_2(tmp_path, run_command, capfd, line, cause, fix):
    program, *arguments = line.split(" ")
    assert run_command(program, *arguments) == 2
    (printed,) = capfd.readouterr().err.splitlines()
    assert printed.startswith(f"{program}: ")
    assert cause in printed
    assert fix in printed


def change_config(**changes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def save(kind: type) -> Callable[[Path], object]:
    small = kind.config_class(
        vocab_size=64, num_hidden_layers=1, hidden_size=16, num_attention_heads=2
    )
    return lambda folder: kind(small).save_pretrained(folder)


def make_it_a_runs(folder: Path) -> None:
    shutil.copytree(folder, folder / "adapter")
    (folder / "config.json").unlink()


def lose_a_shard(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


AGAIN = "Download or copy the model again"
BROKEN_MODELS = [
    (remove("config.json"), "no config.json", "Set model.path to a folder"),
    (make_it_a_runs, "Adapters, runs", "Set model.path=model/adapter."),
    (write("config.json", "{"), "not a valid JSON file", AGAIN),
    (change_config(model_type="lama"), "`lama`", "Upgrade transformers"),
    (change_config(hidden_size=64), "mismatched", "Copy the config.json that"),
    (change_config(architectures=None, model_type="vit"), "ViTConfig", "a causal language"),
    (remove("tokenizer.json"), "tokenizer", AGAIN),
    (remove("model.safetensors"), "model.safetensors", "Weights in other"),
    (write("model.safetensors", "version https://git-lfs"), "header", "`git lfs pull` in a clone"),
    (lose_a_shard, "model-00002-of-00", AGAIN),
    (save(transformers.BertForMaskedLM), "does not predict the next token", "such as Llama"),
    (save(transformers.LlamaModel), "the weights lack lm_head.weight", "download the model again"),
]


@pytest.mark.parametrize(
    ("damage", "cause", "fix"), BROKEN_MODELS, ids=[cause for _, cause, _ in BROKEN_MODELS]
)
def test_a_folder_that_is_no_model_gets_one_line(
    tiny_folder, run_command, capfd, damage, cause, fix
):
    damage(shutil.copytree(tiny_folder, Path("model")))
    capfd.readouterr()
    settings = [
        "model.path=model",
        "model.dtype=float32",
        "data.max_length=64",
        "data.train_rows=4",
    ]
    assert run_command("cera-train", *settings) == 2
    (printed,) = capfd.readouterr().err.splitlines()
    assert printed.startswith("cera-train: model.path=model: ")
    assert cause in printed
    assert fix in printed
    assert len(printed) < 600


def test_debug_shows_the_traceback(run_command, monkeypatch, capfd):
    monkeypatch.setenv("CERA_TRAIN_DEBUG", "")  # restored afterwards
    assert run_command("cera-train", "adapter.r=-1", "--debug") == 2
    first, *_, last = capfd.readouterr().err.strip().splitlines()
    assert first.startswith("Traceback")
    assert "adapter.r=-1: input should" in last


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "cera-train",
            ["-m", "adapter.r=range(1,40)", "train.seed=range(1,40)", "model.path=./no"],
            "model.path=./no",
        ),
        ("cera-eval", ["run=x", "task.limit=0", "task=gsm8k"], "task.limit=0: input should be"),
        ("cera-plan", ["plan.gpu=cpu", "plan.gpus=2"], "there is one CPU"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(tmp_path, name, arguments, message):
    done = command(name, *arguments, cwd=tmp_path, **WITHOUT_TORCH)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "quantisation: nf4",
            "In 'model/mine': ConfigKeyError raised while composing config: unknown",
        ),
        ("path: a: b", "model/mine.yaml:1: broken YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, run_command, capfd, content, message):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(content)
    assert run_command("cera-train", "--config-dir", "conf", "model=mine") == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "evaluated"),
    [
        (["-m", "run=broken,b"], 1, ["broken", "b"]),
        (["run=broken"], 2, ["broken"]),
    ],
)
def test_an_evaluation_that_fails_lets_the_others_run(
    tmp_path, run_command, monkeypatch, capfd, arguments, status, evaluated
):
    begun = []

    def run(composed: DictConfig) -> None:
        begun.append(composed.run)
        if composed.run == "broken":
            raise UserError("broken is no run.")

    monkeypatch.setattr("cera_train.cli.runs.measure", run)
    assert run_command("cera-eval", *arguments) == status
    assert begun == evaluated
    assert capfd.readouterr().err == ("cera-eval: broken is no run.\n" if status else "")
    assert not list(tmp_path.iterdir())


def test_flags_stand_anywhere():
    expected = ["--multirun", "model=mine", "adapter.r=4,5"]
    for arguments in (
        ["-m", "model=mine", "adapter.r=4,5"],
        ["model=mine", "--debug", "adapter.r=4,5", "--multirun"],
    ):
        assert for_hydra("cera-train", arguments) == expected


@pytest.mark.parametrize("program", ["cera-train", "cera-plan"])
def test_without_a_recipe_or_a_model_data_or_tasks_of_ones_own_it_is_the_quickstart(program):
    for arguments in ([], ["name=x"], ["--cfg=job", "adapter=lora"], ["-m", "adapter.r=4,8"]):
        assert "+recipe=quickstart" in for_hydra(program, arguments)
    for arguments in (
        ["--help"],
        ["+recipe=math_r64"],
        ["-m", "+sweep=rank_lr"],
        ["model=llama3_2_1b"],
        ["model.path=a/b"],
        ["data=gsm8k"],
        ["data.train_files=[rows.jsonl]"],
        ["train.tasks=[gsm8k]"],
    ):
        assert "+recipe=quickstart" not in for_hydra(program, arguments)


def test_a_text_that_looks_like_a_number_stays_a_text(run_command, capfd):
    words = ["name=2026_11_30", "model.revision=7e49710", "adapter.r=1_0"]
    assert run_command("cera-train", "--cfg", "job", *words) == 0
    config = yaml.safe_load(capfd.readouterr().out)
    assert (config["name"], config["model"]["revision"]) == ("2026_11_30", "7e49710")
    assert config["adapter"]["r"] == 10
    assert compose("name=1.10").name == "1.10"


@pytest.mark.parametrize("text", ["Hello, (order 5) [sic]", "it's {x}: y", "one, two", "true"])
def test_a_question_needs_no_quotes_for_hydra(text):
    assert compose("run=outputs/a", f"prompt={text}", command="chat").prompt == text


@pytest.mark.parametrize("text", ["it's", "a\\", "a\\'b", "a\\b", "a,b=c", "größe [2]"])
def test_a_quoted_text_is_read_as_it_is(text):
    override = OverridesParser.create().parse_override(f"run={quoted(text)}")
    assert override.value() == text


def test_a_sweep_for_slurm_is_planned_by_the_same_settings(run_command, capfd):
    words = ["hydra/launcher=slurm_gpu", "hydra.launcher.partition=gpu", "launch.detach=true"]
    words += ["model=smollm2_135m", "plan.tokens_per_row=37"]
    assert run_command("cera-plan", "-m", "adapter.r=4,8", *words) == 0
    assert "adapter.r=8" in capfd.readouterr().out


def test_every_usual_name_leads_to_a_setting_that_exists():
    known = [
        name
        for schema in SCHEMAS.values()
        for name in [*vars(schema)["__annotations__"], *fields_of(schema)]
    ]
    for row in USUAL_NAMES.strip().splitlines():
        ours, *names = row.split()
        assert ours.partition("=")[0] in known
        assert all(did_you_mean(name, known) == f"Did you mean {ours}? " for name in names), row
