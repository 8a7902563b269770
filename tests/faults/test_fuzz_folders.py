"""Whatever stands in a run's folder: a reader gives what it holds, or says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tiny_llama
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import changed, fuzz, mutated, result_or_value_error

from cera_train.adapters.build import build
from cera_train.common.files import read_json, read_yaml
from cera_train.runs.evaluation_folder import EvaluationFolder, Generation, Problem
from cera_train.runs.folder import Progress, RunFolder, load_checkpoint
from cera_train.runs.recorded_config import load_config
from cera_train.runs.subject import base_of, check_adapter
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config

PLAIN_CONFIG = {
    "model": {"path": "a/b", "dtype": "bfloat16", "quantization": "none", "trust_remote_code": False},
    "adapter": {"kind": "cera", "r": 64, "alpha": None, "dropout": 0.1, "target_modules": ["q_proj"], "layers": [0]},
    "data": {
        "layout": "text",
        "path": "a/b",
        "prompt": "{a}",
        "completion": "{b}",
        "train_files": [],
        "eval_rows": None,
    },
    "optimizer": {"kind": "adamw", "lr": 3e-4},
    "train": {"epochs": 3, "autocast": None},
    "tracker": {"kinds": {}},
    "name": "run",
    "published": {"eval/perplexity": 1.97},
}


def test_the_config_that_is_damaged_is_one(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PLAIN_CONFIG))
    assert isinstance(load_config(tmp_path / "config.yaml"), Config)


@fuzz
@given(data=st.data())
def test_a_damaged_config_is_a_config_or_a_reason(tmp_path, data):
    path = tmp_path / "config.yaml"
    valid = yaml.safe_dump(PLAIN_CONFIG, sort_keys=False).encode()
    path.write_bytes(data.draw(st.binary(max_size=100) | mutated(valid)))
    config = result_or_value_error(load_config, path)
    assert config is None or isinstance(config, Config)


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_a_config_of_other_values_is_a_config_or_a_reason(tmp_path, data):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(data.draw(changed(PLAIN_CONFIG))))  # JSON is YAML
    config = result_or_value_error(load_config, path)
    assert config is None or isinstance(config, Config)
    result_or_value_error(load_config, path, EvalConfig)


@pytest.mark.slow
@fuzz
@given(prompt=st.text("\\${}abc:'\".?[]oc env,TOK\n", min_size=1, max_size=20))
@example(prompt="${oc.env:HOME}")
@example(prompt="\\${oc.env:HOME}")
@example(prompt="\\\\${name}")
def test_every_prompt_comes_back_as_it_was_written(tmp_path, prompt):
    assume(prompt != "???")  # OmegaConf's mark of a missing value
    tree = PLAIN_CONFIG | {"data": PLAIN_CONFIG["data"] | {"prompt": prompt}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path).data.prompt == prompt


@pytest.mark.parametrize("read", [read_json, read_yaml])
@fuzz
@given(content=st.binary(max_size=100) | st.text("{}[]:,&*!<>|-? \n'\"%@`#~=019.aeT_", max_size=40).map(str.encode))
@example(content=b"!!int ''")
@example(content=b"!!bool x")
@example(content=b"!!timestamp x")
@example(content=b"a: 2001-99-99")
@example(content=b"!!python/object/apply:os.system [id]")
@example(content=b"a: &a [1]\nb: *a")
@example(content=b"[" * 100_000)
def test_any_bytes_are_names_and_values_or_a_reason(tmp_path, read, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    tree = result_or_value_error(read, path)
    assert tree is None or isinstance(tree, dict)


@fuzz
@given(data=st.data())
def test_an_adapter_is_checked_whatever_its_config_says(tmp_path, data):
    valid = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "r": 8, "auto_mapping": None, "loftq_config": {}}
    (tmp_path / "adapter_model.safetensors").touch()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(data.draw(changed(valid))))
    result_or_value_error(check_adapter, tmp_path)
    result_or_value_error(base_of, tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A checkpoint that can be loaded, and its model."""
    model = build(make_tiny_llama().requires_grad_(False), AdapterConfig(r=2))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    with RunFolder(tmp_path_factory.mktemp("run") / "run", {"name": "run"}) as folder:
        folder.save_checkpoint(model, optimizer, Progress(update=3), "digest", keep=1)
        (path,) = folder.checkpoints()
        folder.append_metrics({"update": 3})
    return path, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "progress.json"])
@fuzz
@given(data=st.data())
def test_a_damaged_checkpoint_is_loaded_or_refused(checkpoint, name, data):
    folder, model = checkpoint
    path = folder / name
    valid = path.read_bytes()
    broken = mutated(valid)
    if path.suffix == ".json":
        broken = broken | changed(json.loads(valid)).map(lambda tree: json.dumps(tree).encode())
    path.write_bytes(data.draw(broken))
    try:
        loaded = result_or_value_error(load_checkpoint, folder, model, "digest")
    finally:
        path.write_bytes(valid)
    assert loaded is None or (isinstance(loaded[0], Progress) and isinstance(loaded[0].update, int))


PROBLEM = {"id": "a", "question": "q", "prompt": "p", "gold": "1", "level": 3}
ANSWER = {"problem": "a", "sample": 0, "text": "1", "tokens": 2, "truncated": False}


@fuzz
@given(data=st.data())
def test_lines_of_an_evaluation_are_read_or_named(tmp_path, data):
    for name, valid in (("problems.jsonl", PROBLEM), ("generations.jsonl", ANSWER), ("result.json", {"samples": 1})):
        line = json.dumps(data.draw(changed(valid))).encode()
        (tmp_path / name).write_bytes(data.draw(st.just(line) | mutated(line)))
    folder = EvaluationFolder(tmp_path)
    problems = result_or_value_error(folder.problems)
    assert problems is None or all(isinstance(problem, Problem) for problem in problems)
    answers, broken = folder.answers()
    assert all(isinstance(answer, Generation) and isinstance(answer.text, str) for answer in answers.values())
    assert answers or broken or not (tmp_path / "generations.jsonl").read_bytes().split()
    result_or_value_error(folder.is_finished)
