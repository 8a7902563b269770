"""Every mistake on a command line gets one line and status 2: the place, what is wrong, the
fix."""

import shutil
from pathlib import Path

import pytest
import transformers
import yaml
from commands import WITHOUT_TORCH, command
from hydra.core.override_parser.overrides_parser import OverridesParser

from cera_train.cli.compose import compose
from cera_train.cli.mistakes import SCHEMAS, USUAL_NAMES, did_you_mean, for_hydra
from cera_train.common.settings import fields_of, quoted


def lose_a_shard(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def save_without_a_head(folder: Path) -> None:
    transformers.LlamaModel.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "cause", "fix"),
    [
        (lose_a_shard, "model-00002-of-00", "Download or copy the model again"),
        (save_without_a_head, "the weights lack lm_head.weight", "download the model again"),
    ],
)
def test_a_model_that_lacks_weights_gets_one_line(
    tiny_folder, run_command, capfd, damage, cause, fix
):
    damage(shutil.copytree(tiny_folder, Path("model")))
    capfd.readouterr()
    settings = ["model.path=model", "data=logistic_map", "model.dtype=float32"]
    assert run_command("cera-train", *settings) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("cera-train: model.path=model: ")
    assert cause in line
    assert fix in line


def test_debug_shows_the_traceback(run_command, monkeypatch, capfd):
    monkeypatch.setenv("CERA_TRAIN_DEBUG", "")  # restored afterwards
    assert run_command("cera-train", "adapter.r=-1", "--debug") == 2
    first, *_, last = capfd.readouterr().err.strip().splitlines()
    assert first.startswith("Traceback")
    assert "adapter.r=-1: input should" in last


def test_a_mistake_is_answered_before_torch_is_imported(tmp_path):
    words = ["-m", "adapter.r=range(1,40)", "train.seed=range(1,40)", "model.path=./no"]
    done = command("cera-train", *words, cwd=tmp_path, **WITHOUT_TORCH)
    assert done.returncode == 2
    assert "model.path=./no" in done.stderr
    assert not (tmp_path / "outputs").exists()


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


def test_a_sweep_for_slurm_is_planned_by_the_same_settings(run_command, tiny_folder, capfd):
    words = ["hydra/launcher=slurm_gpu", "hydra.launcher.partition=gpu", "launch.detach=true"]
    words += ["+recipe=logistic_map", f"model.path={tiny_folder}", "data.max_length=64"]
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
