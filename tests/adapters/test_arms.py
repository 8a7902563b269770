"""Arms of studies between LoRA and CeRA: each is one of the two up to a single change."""

import peft
import pytest
import torch
from conftest import make_tiny_llama
from moe_models import make_mixture
from tiny_runs import folder_of
from transformers import AutoModelForCausalLM

from cera_train.adapters import build
from cera_train.adapters.families import family
from cera_train.cera import CeraLinear
from cera_train.common.errors import UserError
from cera_train.runs.results import LOSSES_AFTER, TokenLosses
from cera_train.training.build import build_data

IDS = torch.arange(3, 75).view(3, 24)


@pytest.fixture
def model_of(compose):
    """model_of("lora", *overrides) -> its config, and the tiny model with random weights in A and
    B, the same for every arm."""

    def model_of(name: str, *overrides: str):
        config = compose(f"adapter={name}", "adapter.r=4", *overrides).adapter
        torch.manual_seed(1)
        model = build.build(make_tiny_llama().requires_grad_(False), config)
        draw = torch.Generator().manual_seed(2)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
        return config, model

    return model_of


def cera_layers(model) -> list[CeraLinear]:
    return [module for module in model.modules() if isinstance(module, CeraLinear)]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("arm", ["lora_kaiming", "lora_dropout_hidden"])
def test_it_is_a_lora_without_dropout(model_of, arm):
    _, lora = model_of("lora")
    _, other = model_of(arm)
    torch.testing.assert_close(logits(other), logits(lora))


@pytest.mark.parametrize(
    ("arm", "variance", "drops_units"),
    [("lora_kaiming", 2, False), ("lora_dropout_hidden", 1 / 3, True)],
)
def test_it_differs_from_lora_in_its_start_or_in_the_place_of_dropout(
    compose, arm, variance, drops_units
):
    config = compose(f"adapter={arm}", "adapter.r=64", "adapter.dropout=0.5").adapter
    model = build.build(make_tiny_llama().requires_grad_(False), config)
    layer = cera_layers(model)[0]
    A, _, _, dropout_x, dropout = layer.parts("default")
    assert A.weight.var().item() * layer.in_features == pytest.approx(variance, rel=0.1)
    assert (dropout.p, dropout_x.p) == ((0.5, 0) if drops_units else (0, 0.5))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_input_gate_is_a_sigmoid_of_a_second_product(model_of, mode):
    """With G = A it is silu; at its start, half of the linear branch."""
    _, gated = model_of("cera_gated")
    _, cera = model_of("cera")
    for there, here in zip(cera_layers(cera), cera_layers(gated), strict=True):
        A, B, *_ = there.parts("default")
        here.cera_A["default"].weight.data = torch.cat([A.weight, A.weight])
        here.cera_B["default"].weight.data = B.weight.data
    losses = []
    for model in (gated, cera):
        getattr(model, mode)()
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for there, here in zip(cera_layers(cera), cera_layers(gated), strict=True):
        A, B, *_ = there.parts("default")
        own = here.cera_A["default"].weight.grad
        torch.testing.assert_close(own[:4] + own[4:], A.weight.grad)
        torch.testing.assert_close(here.cera_B["default"].weight.grad, B.weight.grad)


def test_an_input_gate_starts_at_half_of_the_linear_branch(compose):
    config = compose("adapter=cera_gated", "adapter.r=4").adapter
    model = build.build(make_tiny_llama().requires_grad_(False), config)
    for layer in cera_layers(model):
        assert layer.cera_A["default"].weight[4:].eq(0).all()
        assert layer.cera_A["default"].weight[:4].ne(0).all()


def test_an_annealed_gate_goes_from_ceras_to_half_of_it(model_of):
    """In training; outside it the branch is always linear."""
    config, annealed = model_of("cera_anneal")
    _, cera = model_of("cera")
    _, half = model_of("cera_identity", "adapter.alpha=16")
    for share, expected in ((0.0, cera), (0.9, half)):
        family(config.kind).begin_update(annealed, config, share)
        torch.testing.assert_close(logits(annealed.train()), logits(expected))
        torch.testing.assert_close(logits(annealed.eval()), logits(half))


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ("adapter.target_modules=[q_proj,embed_tokens]", make_tiny_llama),
        ("adapter.settings={target_parameters: [experts.down_proj]}", make_mixture),
    ],
)
def test_what_takes_no_gate_is_not_annealed(compose, settings, make):
    config = compose("adapter=cera_anneal", "adapter.r=4", settings).adapter
    with pytest.raises(UserError, match=r"^adapter.kind=anneal: model\.\S+ has no linear A whose"):
        build.build(make().requires_grad_(False), config)


def test_an_annealed_run_is_saved_as_a_lora_that_peft_merges(trained_config, tiny_folder):
    """The merged model has the run's loss on every held-out token."""
    config = trained_config("adapter=cera_anneal", "adapter.dropout=0.3", "train.batch_layout=flat")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder_of(config) / "adapter")
    assert type(model.peft_config["default"]) is peft.LoraConfig
    merged = model.merge_and_unload().eval()
    losses = []
    rows = build_data(config).rows.evaluation
    for number in range(len(rows)):
        ids = torch.tensor(rows.tokens("input_ids", number).to_pylist())
        log_p = merged(ids[None]).logits[0, :-1].log_softmax(-1)
        supervised = torch.tensor(rows.tokens("loss_mask", number).to_pylist())[1:]
        losses.append(-log_p[supervised].gather(1, ids[1:][supervised, None])[:, 0])
    expected = torch.from_numpy(TokenLosses.read(folder_of(config) / LOSSES_AFTER).losses.copy())
    torch.testing.assert_close(torch.cat(losses), expected, rtol=1e-3, atol=1e-4)
