"""Tiny random mixtures of experts, and what their layers compute, as a plain loop over tokens and
experts."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cera_models import adapted, cera
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from benchmarks.tiny_models import tiny_model
from cera_train.cera import CeraConfig, CeraExperts

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen2_moe")
"""gpt_oss keeps its weights transposed, gate and up interleaved, with biases and a clamp; qwen2_moe
has a shared expert."""

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_mixture(model_type: str = "mixtral", **changes) -> nn.Module:
    """A random two-layer mixture, frozen and in eval mode."""
    return tiny_model(model_type, attn_implementation="eager", **changes)


def adapted_mixture(
    model_type: str = "mixtral", name: str = "default", double: bool = False, **settings
) -> PeftModel:
    """A mixture whose experts carry a random adapter, in eval mode."""
    base = make_mixture(model_type)
    return adapted(
        base.double() if double else base, name, **{"target_parameters": PARAMETERS} | settings
    )


def expert_config(**settings) -> CeraConfig:
    return cera(**{"target_parameters": PARAMETERS} | settings)


def experts_of(model: nn.Module) -> list[CeraExperts]:
    return [module for module in model.modules() if isinstance(module, CeraExperts)]


def plain_forward(layer: CeraExperts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """What a layer of experts computes with its active adapters: one token and one expert at a
    time."""
    rows = []
    for x, experts, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
        outputs = []
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            h = plain_gate(layer.base_layer, plain_product(layer, "gate_up_proj", expert, x))
            outputs.append(weight * plain_product(layer, "down_proj", expert, h))
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


def plain_product(layer: CeraExperts, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    weight = getattr(layer.base_layer, name)[expert]
    y = x @ weight if base.is_transposed else weight @ x
    if base.has_bias:
        y = y + getattr(base, f"{name}_bias")[expert]
    for adapter in layer.active_adapters:
        if adapter in layer.cera_A and name in layer.cera_A[adapter]:
            A, B = (
                matrices[adapter][name].weight[expert] for matrices in (layer.cera_A, layer.cera_B)
            )
            y = y + layer.scaling[adapter][name] * (B @ layer.cera_gate[adapter][name](A @ x))
    return y


def plain_gate(experts: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    if "GptOss" in type(experts).__name__:
        gate = gate_up[::2].clamp(max=7.0)
        up = gate_up[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = gate_up.chunk(2)
    return nn.functional.silu(gate) * up


@contextmanager
def plain_experts() -> Iterator[None]:
    """Makes every layer of experts compute by the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CeraExperts, "forward", plain_forward)
        yield


def lora_experts(
    model: PeftModel, base: nn.Module, r: int, parameters: list[str] = PARAMETERS
) -> PeftModel:
    """PEFT's LoRA on the same parameters of another copy of the base, with the same A and B."""
    lora = get_peft_model(
        base, LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=parameters)
    ).eval()
    for ours, theirs in zip(experts_of(model), expert_loras(lora), strict=True):
        for name, wrapper in theirs.items():
            A, B = (matrices["default"][name].weight for matrices in (ours.cera_A, ours.cera_B))
            wrapper.lora_A["default"].weight.data = A.detach().flatten(0, 1).clone()
            wrapper.lora_B["default"].weight.data = B.detach().permute(1, 2, 0).flatten(1).clone()
    return lora


def expert_loras(lora: PeftModel) -> list[dict[str, ParamWrapper]]:
    """The wrappers of every layer of experts, by parameter."""
    found: dict[str, dict[str, ParamWrapper]] = {}
    for name, module in lora.named_modules():
        if isinstance(module, ParamWrapper):
            found.setdefault(name.replace(".base_layer", ""), {})[module.parameter_name] = module
    return list(found.values())
