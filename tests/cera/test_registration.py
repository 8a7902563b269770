"""CeRA as a member of PEFT's enum; copies and gradient checkpointing of an adapted model."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
import sys

import peft
import pytest
import torch
from cera_models import IDS, ROWS, WARNINGS, adapted, base_weights, gradients, logits, with_two
from peft import PeftType

import cera_train.cera
from cera_train.cera import CeraConfig

pytestmark = WARNINGS

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


def test_a_saved_model_state_survives_torch_save():
    model, file = adapted(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = adapted()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(model), logits(twin))


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


def test_training_moves_the_adapter_alone():
    model = adapted(init_weights=True, dropout=0.1).train()
    base, start = base_weights(model), {k: v.clone() for k, v in model.state_dict().items() if "cera_" in k}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(value, base[key]) for key, value in base_weights(model).items())
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in start.items())
