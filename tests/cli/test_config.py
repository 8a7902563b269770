"""Every file of conf/ and recipes/ composes; the schema refuses what makes no sense."""

import re

import pytest

from cera_train.common.files import config_dir
from cera_train.settings.adapters import Activation, DropoutOn, Init, Mix
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config

CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(config_dir("conf").glob("*/*.yaml"))
    if path.parent.name not in ("sweep", "study")  # many whole runs: tests/sweep
]
RECIPES = sorted(config_dir("recipes").glob("*.yaml"))

# What a file leaves for the user to say.
NEEDED = {
    ("data", "jsonl"): ["data.train_files=[rows.jsonl]", "data.eval_rows=5"],
    ("data", "preferences"): ["train.objective=dpo"],
    ("task", "jsonl"): ["task.files=[rows.jsonl]"],
    ("adapter", "full"): ["adapter.r=null"],
    ("adapter", "peft"): ["adapter.method=LOHA"],
    ("recipe", "sft"): ["data.train_files=[rows.jsonl]"],
}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(compose, group, name):
    needed = NEEDED.get((group, name), [])
    if group in ("task", "generation"):
        config = compose("run=outputs/run", "task=math", f"{group}={name}", *needed, command="eval")
        assert isinstance(config, EvalConfig)
    else:
        assert isinstance(compose(f"{group}={name}", *needed), Config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_composes_and_says_what_it_is_for(compose, path):
    config = compose(f"+recipe={path.stem}", *NEEDED.get(("recipe", path.stem), []))
    assert config.name == path.stem
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert re.search(rf"command   .*\+recipe={path.stem}\b", header)
    assert "expected" in header
    assert "cost" in header


def test_the_recipe_sft_names_the_defaults(compose):
    rows = "data.train_files=[rows.jsonl]"
    config = compose(rows)
    assert compose("+recipe=sft", rows, "name=default") == config
    assert (config.adapter.r, config.adapter.alpha, config.adapter.target_modules) == (
        32,
        32,
        "all-linear",
    )
    assert (config.optimizer.lr, config.optimizer.schedule, config.train.epochs) == (
        "auto",
        "linear",
        1,
    )


def test_both_names_for_the_choices_of_cera_agree():
    from cera_train.cera.config import CHOICES

    settings = {"activation": Activation, "init": Init, "dropout_on": DropoutOn, "mix": Mix}
    for name, choices in settings.items():
        assert tuple(choices) == CHOICES[name]
