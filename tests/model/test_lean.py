"""Layers that keep less: the same outputs to the bit, the same gradients up to rounding, fewer bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cera_train.model.lean import keep_less

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm(dtype: torch.dtype) -> nn.Module:
    module = LlamaRMSNorm(48).to(dtype).requires_grad_(False)
    module.weight.copy_(1 + 0.3 * torch.randn(48))
    return module


def mlp(dtype: torch.dtype, act: str = "silu") -> nn.Module:
    config = LlamaConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4, hidden_act=act)
    return LlamaMLP(config).to(dtype).requires_grad_(False)


def gelu(dtype: torch.dtype) -> nn.Module:
    return mlp(dtype, "gelu_pytorch_tanh")


def lean(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    keep_less(changed)
    return changed


def passes(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The output, the gradient of the input, and the bytes that autograd keeps of other tensors than weights."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    (found,) = torch.autograd.grad(output, x, grad)
    return output, found, sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [norm, mlp, gelu])
def test_outputs_are_the_same_to_the_bit_and_gradients_no_farther_from_the_exact(make, dtype):
    torch.manual_seed(1)
    module, x, grad = make(dtype), torch.randn(2, 9, 48, dtype=dtype), torch.randn(2, 9, 48, dtype=dtype)
    output, usual, bytes_before = passes(module, x, grad)
    ours, found, bytes_now = passes(lean(module), x, grad)
    assert torch.equal(ours, output)
    # The norm computes in float32 whatever it is given, so float32 is exact enough.
    wide = torch.float64 if make is not norm else torch.float32
    _, exact, _ = passes(copy.deepcopy(module).to(wide), x.to(wide), grad.to(wide))
    errors = [float((each.double() - exact.double()).norm() / exact.double().norm()) for each in (found, usual)]
    assert errors[0] <= max(1.1 * errors[1], 1e-6), errors
    assert bytes_now < bytes_before or (make is norm and dtype == torch.float32)  # which autograd keeps as it is


def test_a_norm_keeps_its_input_as_it_came_and_an_mlp_gate_and_up():
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert passes(lean(norm(x.dtype)), x, x)[2] == 3 * 48 * 2 + 3 * 4  # and 1 / rms in float32
    assert passes(lean(mlp(x.dtype)), x, x)[2] == 2 * 3 * 96 * 2


def test_a_norm_that_trains_gets_its_gradient():
    usual = norm(torch.float32).requires_grad_()
    ours, x = lean(usual), torch.randn(5, 48)
    for module in (usual, ours):
        module(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, usual.weight.grad)


def test_one_decorator_makes_no_two_forwards_alike(monkeypatch):
    def decorated(forward):
        return lambda self, x: forward(self, x)

    monkeypatch.setattr(LlamaRMSNorm, "forward", decorated(LlamaRMSNorm.forward))
    monkeypatch.setattr(GemmaRMSNorm, "forward", decorated(GemmaRMSNorm.forward))
    gemma = GemmaRMSNorm(48)
    keep_less(gemma)
    assert type(gemma) is GemmaRMSNorm


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_usual_models_are_changed_whole(kind):
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    keep_less(model)
    names = [name for name, module in model.named_modules() if name.endswith(("norm", "mlp"))]
    changed = [name for name, module in model.named_modules() if type(module).__name__.startswith("Lean")]
    assert sorted(changed) == sorted(names)
    assert len(changed) == 2 * (3 + 2 * (kind == "qwen3")) + 1


def test_a_pass_without_gradients_is_the_usual_one(monkeypatch):
    monkeypatch.setattr("cera_train.model.lean.Norm.apply", None)
    monkeypatch.setattr("cera_train.model.lean.Gated.apply", None)
    for module in (norm(torch.float32), mlp(torch.float32)):
        x = torch.randn(4, 48)
        assert torch.equal(lean(module)(x), module(x))


def test_a_compiled_layer_takes_the_usual_way():
    module = lean(nn.Sequential(norm(torch.float32), mlp(torch.float32)))
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    x = torch.randn(4, 48).requires_grad_()
    compiled = torch.compile(module, backend=record, fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1
