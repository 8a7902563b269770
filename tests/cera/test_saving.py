"""Saved and loaded adapters, checkpoints that do not fit, copies, and CeRA as a member of PEFT's enum."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from cera_models import IDS, ROWS, WARNINGS, adapted, cera_dtypes, gradients, logits, with_two
from conftest import make_tiny_llama
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import cera_train.cera
from cera_train.cera import CeraConfig

pytestmark = WARNINGS

# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A saved adapter over the tiny model's folder, and the logits it gives."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(3)
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), alpha=8, target_modules="all-linear")
    model.save_pretrained(folder)
    return folder, logits(model, IDS % 256)


def test_a_saved_adapter_is_safetensors_and_json_and_says_what_it_is(saved):
    folder, _ = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "CERA"
    assert {key: config[key] for key in ("r", "alpha", "dropout", "activation", "inference_mode")} == {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "activation": "silu",
        "inference_mode": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert "base_model.model.model.layers.1.mlp.up_proj.cera_A.weight" in tensors
    assert isinstance(PeftConfig.from_pretrained(str(folder)), CeraConfig)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_gives_the_same_logits_to_the_bit(saved, tiny_folder, low_cpu_mem_usage):
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, IDS % 256), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, IDS % 256), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_over_a_16_bit_base_does_not_round_the_adapter(tmp_path, low_cpu_mem_usage):
    model = adapted(make_tiny_llama().bfloat16())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(make_tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert cera_dtypes(loaded) == {torch.float32}
    assert torch.equal(logits(loaded), expected)
    in_16_bits = PeftModel.from_pretrained(
        make_tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
    )
    assert cera_dtypes(in_16_bits) == {torch.bfloat16}


def test_a_module_of_the_base_may_be_named_like_a_part_of_the_adapter():
    base = nn.ModuleDict({"q": nn.Linear(5, 5), "cera_A": nn.Linear(5, 5)})
    model = get_peft_model(base, CeraConfig(r=2, target_modules=["q"]))
    assert not any(parameter.requires_grad for parameter in base["cera_A"].parameters())
    assert get_peft_model_state_dict(model).keys() == {f"base_model.model.q.cera_{part}.weight" for part in "AB"}


def test_modules_saved_with_the_adapter_come_back_with_it(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients(model)
    model.eval().save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path)), logits(model))


FRESH = """
import hashlib, importlib, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
order, folder, base, out = sys.argv[1:]
for name in order.split(","):
    module = importlib.import_module(name)
    if name == "cera_train":
        importlib.reload(module)
import peft
import torch
from transformers import AutoModelForCausalLM

def digest(model):
    with torch.no_grad():
        return hashlib.sha256(model(input_ids=ids).logits.numpy().tobytes()).hexdigest()

ids = torch.tensor(IDS) % 256
plain = lambda: AutoModelForCausalLM.from_pretrained(base)
models = [
    peft.PeftModel.from_pretrained(plain(), folder),
    peft.PeftModel.from_pretrained(plain(), folder, low_cpu_mem_usage=True),
    peft.AutoPeftModelForCausalLM.from_pretrained(folder),
]
print(*[digest(model) for model in models])
models[0].save_pretrained(out)

import cera_train
importlib.reload(cera_train)
importlib.reload(cera_train.cera)
assert [kind for kind in peft.PeftType if kind == "CERA"] == [peft.PeftType.CERA]
assert len(peft.PeftType) == len(set(peft.PeftType))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "cera_train,peft",
        "peft,cera_train",
        "cera_train,transformers.trainer,peft",  # transformers looks for the spec of PEFT before it imports PEFT
    ],
)
def test_a_fresh_process_that_imports_cera_train_loads_and_saves_the_same_bytes(saved, tiny_folder, tmp_path, order):
    folder, expected = saved
    hash_seed = str(sum(map(ord, order)) % 1000)  # the order of sets of strings follows from it
    done = subprocess.run(
        [sys.executable, "-c", FRESH.replace("IDS", repr(IDS.tolist())), order, folder, tiny_folder, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == {hashlib.sha256(expected.numpy().tobytes()).hexdigest()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


# --- checkpoints that do not fit -------------------------------------------------------------------------------------


def with_changed_tensors(folder: Path, target: Path, change) -> Path:
    """A copy of a saved adapter with other tensors."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


FIRST = "base_model.model.model.layers.0.mlp.down_proj.cera_A.weight"


def only_the_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["base_model.model.model.embed_tokens.weight"] = make_tiny_llama().model.embed_tokens.weight[:300].clone()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), r"1 tensors missing \(first: .*down_proj\.cera_A"),
        (lambda tensors: tensors.update(junk=torch.ones(1)), r"0 tensors missing, 1 without a place .*\(first: junk\)"),
        (
            lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): torch.ones(4, 64)}),
            r"1 without a place in the model \(first: .*layers\.7",
        ),
        (lambda tensors: tensors.clear(), "28 tensors missing"),
        (lambda tensors: tensors.update({FIRST: tensors[FIRST][:2].clone()}), "size mismatch for .*down_proj.cera_A"),
        (
            lambda tensors: tensors.update({key.replace("cera_", "lora_"): tensors.pop(key) for key in list(tensors)}),
            "28 tensors missing .* 28 without a place",
        ),
    ],
    ids=["missing", "extra", "extra-layer", "empty", "misshapen", "lora"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, tiny_folder, tmp_path, change, message, low_cpu_mem_usage):
    folder = with_changed_tensors(saved[0], tmp_path / "changed", change)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), name="first")
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)


# --- the registration, copies, gradient checkpointing ----------------------------------------------------------------


def test_registering_twice_is_harmless():
    before, count = PeftType.CERA, len(PeftType)
    importlib.reload(cera_train)
    importlib.reload(cera_train.cera)
    assert PeftType.CERA is before is PeftType("CERA") is PeftType["CERA"]
    assert len(PeftType) == count
    assert [kind.value for kind in PeftType].count("CERA") == 1
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CERA] is CeraConfig is cera_train.cera.CeraConfig


def test_the_new_member_behaves_like_a_member():
    member = PeftType.CERA
    assert isinstance(member, PeftType)
    assert member == "CERA"
    assert (member.name, member.value, hash(member)) == ("CERA", "CERA", hash(PeftType("CERA")))
    assert member in PeftType
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"CERA"'
    assert repr(member) == "<PeftType.CERA: 'CERA'>"
    assert list(PeftType)[-1] is member
    assert vars(member).keys() == vars(PeftType.LORA).keys()
    assert member._sort_order_ == list(PeftType).index(member)
    if sys.version_info >= (3, 12):
        assert "CERA" in PeftType


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_gives_the_same_and_goes_its_own_way(copied):
    model = with_two()
    expected = logits(model, adapter_names=ROWS)
    twin = copied(model)
    assert torch.equal(logits(twin, adapter_names=ROWS), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, adapter_names=ROWS), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout, use_reentrant):
    model = adapted(dropout=dropout, target_modules="all-linear")
    torch.manual_seed(5)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(5)
    found = gradients(model)
    assert len(expected) == 28
    torch.testing.assert_close(found, expected)
