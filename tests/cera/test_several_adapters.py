"""Several adapters on one model, a different one for each row, and what a branch that is no matrix cannot do."""

from __future__ import annotations

import pytest
import torch
from cera_models import IDS, ROWS, WARNINGS, adapted, cera, cera_layers, logits, with_two
from conftest import make_tiny_llama
from moe_models import MIXTURES, mixture_with_two
from peft import PeftModel

pytestmark = WARNINGS

# --- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_switch_add_up_and_turn_off():
    base = logits(make_tiny_llama())
    model = with_two()
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    for one, other in [(first, base), (second, base), (first, second), (both, first), (both, second)]:
        assert not torch.allclose(one, other, atol=1e-3)

    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


def test_an_added_adapter_is_neither_active_nor_trainable_until_it_is_set():
    model = with_two()

    def trainable() -> set[str]:
        return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert model.active_adapters == ["first"]
    assert trainable() == {"first"}
    model.set_adapter("second")
    assert trainable() == {"second"}
    model.base_model.set_adapter(["first", "second"])
    assert trainable() == {"first", "second"}


def test_a_deleted_adapter_is_gone_and_the_other_takes_over():
    model = adapted(name="first")
    model.add_adapter("second", cera(r=6))
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("first")
    with pytest.warns(UserWarning, match="first was active which is now deleted. Setting active adapter to second"):
        model.delete_adapter("first")
    assert list(model.peft_config) == model.active_adapters == ["second"]
    assert torch.equal(logits(model), expected)
    assert not any(".first" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="first does not exist"):
        model.delete_adapter("first")


# --- a different adapter for each row --------------------------------------------------------------------------------


def alone(model: PeftModel, row: int, call):
    """What a row gives when it runs alone, with its adapter active."""
    if ROWS[row] == "__base__":
        with model.disable_adapter():
            return call(IDS[row : row + 1])
    model.set_adapter(ROWS[row])
    return call(IDS[row : row + 1])


@pytest.mark.parametrize("model_type", ["llama", *MIXTURES])
def test_every_row_equals_running_alone_with_its_adapter(model_type):
    is_dense = model_type == "llama"
    model = with_two() if is_dense else mixture_with_two(model_type)
    tolerance = {} if is_dense else {"rtol": 1e-4, "atol": 1e-4}
    mixed = logits(model, adapter_names=ROWS)
    for row in range(4):
        expected = alone(model, row, lambda ids: logits(model, ids))
        torch.testing.assert_close(mixed[row : row + 1], expected, **tolerance)
    assert not torch.allclose(mixed, logits(model), atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "copies"),
    [({}, 1), ({"num_beams": 3}, 1), ({"num_beams": 3, "num_return_sequences": 2}, 2)],
    ids=["greedy", "beams", "beams-returned"],
)
@pytest.mark.parametrize("make", [with_two, mixture_with_two])
def test_every_row_generates_what_it_generates_alone(make, settings, copies):
    model = make()

    def generate(ids: torch.Tensor, **kwargs) -> torch.Tensor:
        mask = torch.ones_like(ids)
        settings_ = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | settings
        return model.generate(input_ids=ids, attention_mask=mask, **settings_, **kwargs)

    mixed = generate(IDS, adapter_names=ROWS)
    assert len(mixed) == 4 * copies
    for row in range(4):
        assert torch.equal(mixed[row * copies : (row + 1) * copies], alone(model, row, generate))
    model.set_adapter("first")
    assert not torch.equal(mixed, generate(IDS))


def test_names_of_rows_are_refused_in_training_unknown_or_in_a_wrong_number():
    model = with_two()
    with pytest.raises(ValueError, match=r"adapter_names has other; the adapters of this model are first, second"):
        logits(model, adapter_names=["first", "other", "first", "first"])
    for count in (2, 3, 5, 8):  # two names for four rows could pass for beams
        with pytest.raises(ValueError, match=f"expected 4 names, got {count}"):
            logits(model, adapter_names=["first"] * count)
    settings = {"attention_mask": torch.ones_like(IDS), "num_beams": 3, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"expected 12 names, got 6"):
        model.generate(input_ids=IDS, adapter_names=["first"] * 2, **settings)
    with pytest.raises(ValueError, match=r"inference only: call model.eval\(\) first"):
        logits(model.train(), adapter_names=ROWS)


# --- what a branch that is no matrix cannot do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ],
    ids=["merge_and_unload", "merge_adapter", "layer"],
)
def test_merge_is_refused_with_a_reason_and_changes_nothing(merge):
    model = adapted(modules_to_save=["embed_tokens"])
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="CeRA cannot be merged: its branch is non-linear in x"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_a_weighted_sum_of_adapters_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="cannot be combined into one"):
        with_two().add_weighted_adapter(["first", "second"], [0.5, 0.5], "third")


def test_unload_gives_the_base_model_back():
    expected, weights = logits(make_tiny_llama()), make_tiny_llama().state_dict()
    base = with_two(modules_to_save=["lm_head"]).unload()
    assert type(base) is type(make_tiny_llama())
    assert not cera_layers(base)
    assert torch.equal(logits(base), expected)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())
