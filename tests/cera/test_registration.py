"""CeRA as a member of PEFT's enum; copies and gradient checkpointing of an adapted model."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys

import peft
import pytest
import torch
from cera_models import ROWS, WARNINGS, adapted, gradients, logits, with_two
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
