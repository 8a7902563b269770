"""Saved and loaded adapters, checkpoints that do not fit, copies, and CeRA as a member of PEFT's enum."""

from __future__ import annotations

import copy
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
from cera_models import IDS, WARNINGS, adapted, cera_dtypes, gradients, logits, with_two
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
    assert [config[key] for key in ("peft_type", "r", "alpha", "activation")] == ["CERA", 4, 8, "silu"]
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


def test_a_checkpoint_without_gamma_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = CeraConfig(r=4, mix="learned", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="4 tensors missing .*cera_gate.default.gamma"):
        PeftModel.from_pretrained(make_tiny_llama(), tmp_path, config=config)


def test_a_learned_mix_is_saved_and_loaded_whole(tmp_path):
    model = adapted(mix="learned", dropout_on="input")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()), logits(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 * 3
    assert gradients(model).keys() == trained


def test_modules_saved_with_the_adapter_come_back_with_it(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients(model)
    model.eval().save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path)), logits(model))


FRESH = """
import sys
import IMPORTS
import peft, torch
from transformers import AutoModelForCausalLM
folder, base, ids, out = sys.argv[1:]
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, out + "/logits.pt")
model.save_pretrained(out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["cera_train, peft", "peft, cera_train"])
def test_a_fresh_process_that_imports_cera_train_loads_and_saves_the_same_bytes(saved, tiny_folder, tmp_path, imports):
    folder, expected = saved
    torch.save(IDS % 256, tmp_path / "ids.pt")
    program = FRESH.replace("IMPORTS", imports)
    arguments = [folder, tiny_folder, tmp_path / "ids.pt", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), r"1 tensors missing \(first: .*down_proj\.cera_A"),
        (lambda tensors: tensors.update(junk=torch.ones(1)), r"0 tensors missing, 1 without a place .*\(first: junk\)"),
        (lambda tensors: tensors.update({FIRST: tensors[FIRST][:2].clone()}), "size mismatch for .*down_proj.cera_A"),
        (
            lambda tensors: tensors.update({key.replace("cera_", "lora_"): tensors.pop(key) for key in list(tensors)}),
            "28 tensors missing .* 28 without a place",
        ),
    ],
    ids=["missing", "extra", "misshapen", "lora"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, tiny_folder, tmp_path, change, message):
    folder = with_changed_tensors(saved[0], tmp_path / "changed", change)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base, folder)


# --- the registration, copies, gradient checkpointing ----------------------------------------------------------------


def test_registering_twice_is_harmless():
    before, count = PeftType.CERA, len(PeftType)
    importlib.reload(cera_train)
    importlib.reload(cera_train.cera)
    assert PeftType.CERA is before is PeftType("CERA") is PeftType["CERA"]
    assert len(PeftType) == count
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CERA] is CeraConfig is cera_train.cera.CeraConfig


def test_the_new_member_behaves_like_a_member():
    member = PeftType.CERA
    assert isinstance(member, PeftType)
    assert (member, member.name, member.value) == ("CERA", "CERA", "CERA")
    assert member in PeftType
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"CERA"'
    assert list(PeftType)[-1] is member
    assert vars(member).keys() == vars(PeftType.LORA).keys()
    if sys.version_info >= (3, 12):
        assert "CERA" in PeftType


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_the_same_and_goes_its_own_way(copied):
    model = with_two()
    expected, twin = logits(model), copied(model)
    assert torch.equal(logits(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = adapted(dropout=0.5, target_modules="all-linear")
    torch.manual_seed(5)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(5)
    found = gradients(model)
    assert len(expected) == 28
    torch.testing.assert_close(found, expected)
