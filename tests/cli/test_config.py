"""Every file of conf/ and recipes/ composes; the schema refuses what makes no sense."""

import re

import pytest

from cera_train.common.files import config_dir
from cera_train.common.settings import to_plain
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


def test_the_globs_found_the_files():
    assert len(CHOICES) >= 29
    assert {group for group, _ in CHOICES} == {
        "protocol",
        "model",
        "adapter",
        "data",
        "optimizer",
        "tracker",
        "task",
        "generation",
    }
    assert len(RECIPES) >= 17


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
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert re.search(rf"command   .*\+recipe={path.stem}\b", "\n".join(header))
    assert "expected" in "\n".join(header)
    assert "cost" in "\n".join(header)


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


@pytest.mark.parametrize(
    "overrides", [[], ["+recipe=math_lora_r512"], ["+recipe=quickstart", "adapter=dora"]]
)
def test_a_plan_is_of_the_same_settings_as_the_run(compose, overrides):
    plan = to_plain(compose(*overrides, command="plan"))
    assert {key: value for key, value in plan.items() if key not in ("plan", "run")} == to_plain(
        compose(*overrides)
    )


def test_a_recipe_yields_to_the_command_line(compose):
    config = compose("+recipe=math_r64", "model=llama3_2_1b", "adapter=lora", "adapter.r=512")
    assert (config.model.path, config.adapter.kind, config.adapter.r) == (
        "meta-llama/Llama-3.2-1B",
        "lora",
        512,
    )
    assert config.data.path == "TIGER-Lab/MathInstruct"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.dropout=1", "adapter.dropout=1.0: input should be less than 1."),
        ("adapter.target_modules='(q'", "(q: it is not a regular expression: missing )"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a positive number, or auto."),
        ("optimizer.lr=inf", "optimizer.lr=inf: expected a positive number, or auto."),
        ("optimizer.lr=true", "optimizer.lr=true: expected a positive number, or auto."),
        ("adapter.layers=[]", "adapter.layers=[]: list should have at least 1 item"),
        ("tracker.kinds={wandb:3}", "tracker.kinds.wandb=3: input should be a valid dictionary."),
        (
            "data.mix=[{weight:-1,train_files:[a.jsonl]}]",
            "data.mix.0.weight=-1.0: input should be greater than or",
        ),
        ("data.logistic_map.growth=[3,5]", "[3,5]: expected numbers above 0 and up to 4."),
        ("launch.processes=0", "launch.processes=0: string should match pattern '^(auto|"),
        ("train.server=localhost:8000", "string should match pattern '^https?://"),
        ("hub.push=a/b/c", "hub.push=a/b/c: string should match pattern"),
        ("name=..", "name=..: expected the name of one folder"),
        (
            "train.micro_batch_tokens=10",
            "train.micro_batch_tokens=10 is less than data.max_length=128",
        ),
        (
            "data=jsonl data.eval_files=[a.jsonl] data.path=x/y",
            "data.eval_files without data.train_files",
        ),
        ("data=gsm8k data.completion=''", "data.layout=text needs data.prompt and data.completion"),
        ("data.eval_rows=null", "data.layout=logistic_map needs data.eval_rows"),
        (
            "model.quantization=nf4 model.dtype=float16",
            "model.quantization=nf4 does not compute in float16",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(compose, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compose(*override.split(" "))


def test_both_names_for_the_choices_of_cera_agree():
    from cera_train.cera.config import CHOICES

    settings = {"activation": Activation, "init": Init, "dropout_on": DropoutOn, "mix": Mix}
    for name, choices in settings.items():
        assert tuple(choices) == CHOICES[name]


def test_templates_take_line_breaks_as_the_readme_quotes_them(compose):
    """bash turns $'...' into a real line break; a backslash and an n would be two characters of the
    template."""
    rows = ["data=jsonl", "data.train_files=[rows.jsonl]", "data.eval_rows=5"]
    config = compose(*rows, 'data.prompt="Q: {question}\nA:"', 'data.completion=" {answer}"')
    assert (config.data.prompt, config.data.completion) == ("Q: {question}\nA:", " {answer}")
    task = compose("run=x", "task=gsm8k", 'task.stop=["\nQuestion:"]', command="eval").task
    assert task.stop == ["\nQuestion:"]
