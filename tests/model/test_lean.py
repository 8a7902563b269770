"""Layers that keep less for backward have bit-identical outputs and fewer bytes."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from benchmarks.tiny_models import tiny_model
from cera_train.model.lean import keep_less


def norm(dtype: torch.dtype) -> nn.Module:
    module = LlamaRMSNorm(48).to(dtype).requires_grad_(False)
    module.weight.copy_(1 + 0.3 * torch.randn(48))
    return module


def mlp(dtype: torch.dtype, kind: type = LlamaMLP) -> nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, hidden_act="gelu_pytorch_tanh")
    return kind(config).to(dtype).requires_grad_(False)


def lean(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    keep_less(changed)
    return changed


def passes(
    module: nn.Module, x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The output, the gradient of the input, and the bytes that autograd keeps, except weights."""
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
    (gradient,) = torch.autograd.grad(output, x, grad)
    return output, gradient, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [norm, mlp])
def test_outputs_are_bit_identical_and_gradients_at_least_as_exact(make, dtype):
    torch.manual_seed(1)
    module = make(dtype)
    x = torch.randn(2, 9, 48, dtype=dtype)
    grad = torch.randn(2, 9, 48, dtype=dtype)
    output, gradient, _ = passes(module, x, grad)
    lean_output, lean_gradient, _ = passes(lean(module), x, grad)
    assert torch.equal(lean_output, output)
    # The norm computes in float32 for any input, so float32 is exact enough.
    wide = torch.float64 if make is not norm else torch.float32
    _, exact, _ = passes(copy.deepcopy(module).to(wide), x.to(wide), grad.to(wide))
    lean_error, error = (
        float((each.double() - exact.double()).norm()) for each in (lean_gradient, gradient)
    )
    assert lean_error <= max(1.1 * error, 1e-6 * float(exact.norm()))


def test_a_norm_keeps_only_its_raw_input_and_an_mlp_only_gate_and_up():
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert passes(lean(norm(x.dtype)), x, x)[2] == 3 * 48 * 2 + 3 * 4  # and 1 / rms in float32
    assert passes(lean(mlp(x.dtype)), x, x)[2] == 2 * 3 * 96 * 2


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Olmo2RMSNorm, Clamped])
def test_a_layer_that_computes_something_else_is_left_unchanged(kind):
    module = mlp(torch.float32, kind=kind) if kind is Clamped else kind(48)
    keep_less(module)
    assert type(module) is kind


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_layer_of_common_models_is_changed_before_weights_are_loaded(kind):
    config = tiny_model(kind).config
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        keep_less(model)
    names = [name for name, module in model.named_modules() if name.endswith(("norm", "mlp"))]
    changed = [
        name for name, module in model.named_modules() if type(module).__name__.startswith("Lean")
    ]
    assert sorted(changed) == sorted(names)
    assert torch.equal(torch.random.get_rng_state(), state)
