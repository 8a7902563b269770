"""The check of an adapter before an update passes sound methods of PEFT, comes back to the start,
and what they save is whole."""

import functools

import peft
import pytest
import torch
from cera_models import logits
from conftest import make_tiny_llama

from cera_train.adapters import build, saved
from cera_train.adapters.probe import check_effect
from cera_train.distributed.sharding import trainable_weights
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import pass_padded
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Dtype

IDS = torch.arange(3, 51).view(2, 24)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_method_for_two_tokens_passes_and_comes_back_to_its_start(autocast):
    config = AdapterConfig(
        "peft",
        None,
        None,
        target_modules=None,
        method="TRAINABLE_TOKENS",
        settings={"token_indices": [200, 300]},
    )
    model = build.build(make_tiny_llama().requires_grad_(False), config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    base = model.get_base_model()
    dtype = Dtype.bfloat16 if autocast else None
    passes = functools.partial(pass_padded, LanguageModel(model, base, dtype))
    check_effect(model, base, config, passes)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("LORA", {"init_lora_weights": "mica"}),  # trains A beside a frozen B
        ("PSOFT", {}),  # caches what it computes
        ("RANDLORA", {"save_projection": False}),  # draws its projection again
    ],
)
def test_what_is_saved_is_whole_for_us_and_for_peft_alone(method, settings, tmp_path):
    config = AdapterConfig("peft", 4, None, method=method, settings=settings)
    model = build.build(make_tiny_llama().requires_grad_(False), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    saved.save(model, trainable_weights(model), tmp_path)
    attached = saved.attach(make_tiny_llama().requires_grad_(False), tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    torch.manual_seed(5)
    for other in (attached, loaded):
        theirs = logits(other.eval(), IDS)
        torch.testing.assert_close(theirs, logits(model.eval(), IDS), rtol=1e-4, atol=1e-4)
