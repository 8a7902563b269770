"""A first forward and backward pass proves that every adapter runs and learns, or names the ones
that do not."""

import pytest
import torch
from cera_models import IDS, WARNINGS, adapted
from peft import get_peft_model
from torch import nn

from cera_train.cera import CeraConfig, check_coverage
from cera_train.cera.coverage import Coverage

pytestmark = WARNINGS


def fresh(**settings) -> nn.Module:
    """A model with a fresh adapter, by default on all linears, in train mode."""
    defaults = {"init_weights": True, "dropout": 0.1, "target_modules": "all-linear"}
    return adapted(**defaults | settings).train()


def passes(model: nn.Module) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def refusal(model: nn.Module) -> str:
    with pytest.raises(ValueError, match="would not train") as caught, check_coverage(model):
        passes(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fresh_adapter_is_proven_though_the_gradient_of_A_is_zero():
    model = fresh(activation="relu", r=1)  # relu may switch off the only unit
    with check_coverage(model) as coverage:
        passes(model)
    assert len(coverage.layers) == 14
    assert not any(
        weight.grad.any() for name, weight in model.named_parameters() if "cera_A" in name
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_several_passes_are_proven(reentrant):
    model = fresh()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with check_coverage(model):
        passes(model)
        passes(model)


@pytest.mark.parametrize("change", [lambda output: output.detach(), lambda output: output * 0])
def test_an_output_that_does_not_reach_the_loss_is_refused(change):
    model = fresh(target_modules=["up_proj"])
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, args, output: change(output))
    assert "model.layers.0.mlp.up_proj: called, but the loss has no gradient" in refusal(model)


def test_a_matrix_without_gradient_is_refused():
    model = fresh(target_modules=["q_proj"])
    A = model.base_model.model.model.layers[0].self_attn.q_proj.cera_A["default"]
    # A hook selects the plain formula.
    A.register_forward_hook(lambda module, args, output: output.detach())
    assert "model.layers.0.self_attn.q_proj: no gradient reaches cera_A.default.weight" in refusal(
        model
    )


class Experts(nn.Module):
    """Experts as modules, of which the first `running` run."""

    def __init__(self, running: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(5)
        )
        self.running = running

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts[: self.running]) + x


@pytest.mark.parametrize("running", [2, 0])
def test_experts_without_a_token_are_exempt(running):
    model = get_peft_model(
        nn.Sequential(Experts(running)), CeraConfig(r=2, target_modules=r".*experts\.\d\.\d")
    )
    coverage = Coverage.of_adapters(model)
    with coverage.watch():
        model(torch.randn(3, 4).requires_grad_()).square().sum().backward()
    if running:
        assert coverage.problem() is None
    else:  # the router is not to blame
        assert "10 of 10 adapted modules would not train" in coverage.problem()


def test_processes_share_what_they_have_seen(monkeypatch):
    model = fresh(target_modules=["q_proj"])
    idle = Coverage.of_adapters(model)
    busy = Coverage.of_adapters(model)
    with busy.watch():
        passes(model)
    model.zero_grad()
    with idle.watch():
        pass
    assert idle.problem() is not None

    def gather(seen: list, ours: tuple) -> None:
        seen[:] = ours, (busy.called, busy.moves_loss, busy.has_gradient)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with idle.watch():
        pass
    assert idle.problem() is None
