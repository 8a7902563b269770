"""Tiny models with CeRA adapters, for the tests of PEFT's interface."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn

from cera_train.cera import CeraConfig, CeraLayer

WARNINGS = pytest.mark.filterwarnings(
    "error",
    # names on which releases of PEFT and transformers do not agree yet
    "ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning",
    # PEFT's, when it saves a model that was created in memory and has no name
    "ignore:Could not find a config file in:UserWarning",
    # torch's, of a version of Python
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
    # torch's, when PEFT loads with low_cpu_mem_usage
    "ignore:for .* copying from a non-meta parameter:UserWarning",
)

IDS = torch.tensor(
    [
        [5, 17, 99, 4, 250, 31],
        [7, 7, 300, 12, 3, 8],
        [401, 2, 45, 45, 6, 9],
        [11, 500, 23, 8, 64, 77],
    ]
)


def cera(**settings) -> CeraConfig:
    """A configuration whose adapters start with a random B, so that they change the model."""
    return CeraConfig(
        **{"r": 4, "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"} | settings
    )


def adapted(base=None, name: str = "default", **settings) -> PeftModel:
    return get_peft_model(
        make_tiny_llama() if base is None else base, cera(**settings), adapter_name=name
    ).eval()


def with_two() -> PeftModel:
    """A model with the adapters "first", which is active, and "second", of another rank, gate and
    scale."""
    model = adapted(name="first")
    model.add_adapter(
        "second", cera(r=6, alpha=12, activation="gelu", target_modules=["k_proj", "v_proj"])
    )
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def cera_layers(model: nn.Module) -> list[str]:
    """Names of the adapted projections, in the base model's own spelling."""
    found = [name for name, module in model.named_modules() if isinstance(module, CeraLayer)]
    return [name.removeprefix("base_model.model.") for name in found]


def cera_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if "cera_" in name}


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """The gradients of the loss in train mode (without dropout, this is a function of the weights
    alone)."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
