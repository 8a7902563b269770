"""Every class of experts that transformers calls through its interface: CeRA with an identity gate
equals PEFT's LoRA, which changes the weights and lets the class itself compute."""

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from cera_models import WARNINGS
from moe_models import experts_of, lora_experts
from peft import get_peft_model
from torch import nn

from cera_train.cera import CeraConfig
from cera_train.cera.experts import expert_parameters

pytestmark = [WARNINGS, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = Path(transformers.__file__).parent / "models"
FILES = sorted(
    file
    for file in MODELS.glob("*/modeling_*.py")
    if "\n@use_experts_implementation" in file.read_text()
)
FIELDS = {
    **dict.fromkeys(
        (
            "hidden_size",
            "moe_hidden_size",
            "moe_intermediate_size",
            "intermediate_size",
            "expert_dim",
        ),
        32,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "num_routed_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    **dict.fromkeys(("swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap"), 7.0),
    **{
        "n_routed_experts": 4,
        "moe_latent_size": None,
        "swiglu_alpha": 1.702,
        "post_norm_eps": 1e-6,
    },
}
"""What experts of all models read of a config."""


class Layer(nn.Module):
    """What PEFT needs around experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.mlp.experts(*inputs)


def classes_of(file: Path) -> list[type[nn.Module]]:
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return [
        value
        for value in classes
        if "Experts" in value.__name__ and hasattr(value.forward, "__wrapped__")
    ]


def make_experts(experts_class: type[nn.Module]) -> nn.Module:
    """Random experts of this class."""
    takes_width = "intermediate_size" in inspect.signature(experts_class.__init__).parameters
    config = transformers.PreTrainedConfig(**FIELDS)
    config._experts_implementation = "eager"
    experts = experts_class(config, **{"intermediate_size": 32} if takes_width else {})
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    return experts


def test_the_glob_found_them():
    assert len(FILES) > 50


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_identity_gate_equals_pefts_lora(file):
    classes = classes_of(file)
    assert classes
    for experts_class in classes:
        experts = make_experts(experts_class)
        names = [f"mlp.experts.{name}" for name in expert_parameters(experts)]
        assert len(names) == 2
        settings = {
            "activation": "identity",
            "dropout": 0.0,
            "init_weights": False,
            "target_parameters": names,
        }
        base = Layer(copy.deepcopy(experts))
        model = get_peft_model(Layer(experts), CeraConfig(r=4, **settings)).eval()
        lora = lora_experts(model, base, r=4, parameters=names)
        layer = experts_of(model)[0]
        num_experts, _, d_in = layer.cera_A["default"][names[0].rpartition(".")[2]].weight.shape
        index = torch.stack([torch.randperm(num_experts)[:2] for _ in range(7)])
        inputs = torch.randn(7, d_in), index, torch.rand(7, 2)
        with torch.no_grad(), model.disable_adapter():
            untouched = model(*inputs)
        torch.testing.assert_close(model(*inputs), lora(*inputs), rtol=1e-3, atol=1e-3)
        assert (model(*inputs) - untouched).norm() > 0.01 * untouched.norm()
