"""Settings of an adapter on experts, what they build, and the spectra of its branches."""

import pytest
import torch
from branches import MASKS, ROWS, forward_of
from conftest import make_tiny_llama
from moe_models import MIXTURES, expert_config, expert_loras, experts_of, make_mixture
from peft import get_peft_model
from torch import nn

from cera_train.adapters import build
from cera_train.adapters.spectrum import measure_spectra
from cera_train.cera import CeraExperts, CeraLayer
from cera_train.cera.layer import CeraLinear
from cera_train.common.errors import UserError
from cera_train.model.batches import flat_batch, padded_batch
from cera_train.settings.adapters import AdapterConfig

DOWN = ["mlp.experts.down_proj"]


def refuses(message: str):
    """One line, whose start is the place."""
    return pytest.raises(UserError, match=rf"\A{message}[^\n]*\Z")


def built(model_type: str = "mixtral", **settings):
    config = AdapterConfig(**({"r": 4, "dropout": 0.0} | settings))
    return build.build(make_mixture(model_type).requires_grad_(False), config)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_has_experts_in_or_out(model_type):
    without = built(model_type, target_modules="all-linear")
    model = built(model_type, target_modules="all-linear", experts=True, expert_r=2)
    assert not experts_of(without)
    assert len(experts_of(model)) == 2
    linears = [name for name, module in without.named_modules() if isinstance(module, CeraLayer)]
    assert linears == [name for name, module in model.named_modules() if type(module) is CeraLinear]
    layer = experts_of(model)[0]
    assert list(layer.cera_A["default"]) == ["gate_up_proj", "down_proj"]
    assert layer.r["default"] == {"gate_up_proj": 2, "down_proj": 2}
    weights = sum(
        weight.numel() for layer in experts_of(model) for weight in layer.parameters() if weight.requires_grad
    )
    trainable, total = build.parameter_counts(model)
    assert (trainable - weights, total - weights) == build.parameter_counts(without)
    assert model.peft_config["default"].target_parameters == ["experts.gate_up_proj", "experts.down_proj"]


def test_experts_are_not_compiled_where_torch_cannot(monkeypatch):
    experts, none = (AdapterConfig(r=4, target_modules="all-linear", experts=value) for value in (True, False))
    monkeypatch.setattr(build, "EXPERTS_COMPILE", False)
    with pytest.raises(UserError, match=r"train\.compile=true: torch 2\..* compiles no adapted experts: leave it out"):
        build.check(experts, is_compiled=True)
    build.check(none, is_compiled=True)
    build.check(experts)


def test_b_of_every_expert_learns_faster_where_it_should():
    config = AdapterConfig(r=4, dropout=0.0, experts=True, b_lr_ratio=4)
    model = build.build(make_mixture().requires_grad_(False), config)
    fast = {id(weight) for weight in build.parameter_groups(model, config)[1]["params"]}
    matrices = [matrix for layer in experts_of(model) for matrix in layer.cera_B["default"].values()]
    assert {id(matrix.weight) for matrix in matrices} <= fast


def test_pefts_lora_takes_experts_by_its_own_settings():
    settings = {"kind": "lora", "target_modules": ["q_proj"], "settings": {"target_parameters": DOWN}}
    lora = built(**settings)
    assert [list(wrappers) for wrappers in expert_loras(lora)] == [["down_proj"]] * 2
    with refuses("adapter.kind=lora adapter.settings.target_parameters=.*does not work with lora_dropout"):
        built(dropout=0.1, **settings)


def test_experts_that_a_model_lacks_are_refused():
    with refuses("adapter.experts=True: this model has no experts, it is dense. Set adapter.experts=false."):
        build.build(make_tiny_llama(), AdapterConfig(r=4, experts=True))
    with refuses("adapter.target_parameters: 'experts.up_proj' is no expert's .*There are: experts.gate_up_pro"):
        built(target_parameters=[*DOWN, "experts.up_proj"])


def test_quantised_experts_are_refused_by_name():
    model = make_mixture()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.uint8), requires_grad=False)
    with refuses(r"adapter.kind=cera: .*layers.1.mlp.experts.*down_proj of MixtralExperts is quantised .torch.uint8"):
        build.build(model, AdapterConfig(r=4, target_modules=["q_proj"], experts=True))


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("batch", [flat_batch, padded_batch])
def test_every_experts_spectrum_equals_an_svd_of_its_outputs(model_type, batch):
    if model_type == "gpt_oss" and batch is flat_batch:
        pytest.skip("its attention looks beyond a sequence of a flat row, and so no run flattens its rows")
    model = get_peft_model(make_mixture(model_type), expert_config(alpha=8, dropout=0.5)).train()
    probe = [(batch(ROWS[:2], MASKS[:2]), True), (batch(ROWS[2:], MASKS[2:]), True)]
    spectra = measure_spectra(model, forward_of(model), probe)
    outputs = expert_outputs(model)
    assert spectra.keys() == outputs.keys()
    assert len(spectra) > 8
    for name, spectrum in spectra.items():
        expected = torch.linalg.svdvals(outputs[name] - outputs[name].mean(0))
        count = min(4, len(expected))
        values = spectrum.singular_values
        torch.testing.assert_close(values[:count], expected[:count], rtol=5e-3, atol=1e-4 * outputs[name].norm().item())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def expert_outputs(model) -> dict[str, torch.Tensor]:
    """What the adapter adds for every expert that got tokens, [tokens, d_out], row by row of the probe."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook_of(name: str, layer: CeraExperts):
        def add(parameter, result, x, routing):
            branch = layer.branch(x, "default", parameter, routing)
            for place, expert in enumerate(routing.experts.tolist()):
                found.setdefault(f"{name}.{parameter}.{expert}", []).append(branch[place].double())
            return result + branch

        return add

    for name, layer in model.named_modules():
        if isinstance(layer, CeraExperts):
            layer._add_branches = hook_of(name.removeprefix("base_model.model."), layer)
    model.eval()
    for row in ROWS:
        model(input_ids=torch.tensor([row]))
    return {name: torch.stack(rows) for name, rows in found.items()}
