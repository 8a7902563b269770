"""The real model and adapter on the meta device, which has shapes and no memory: their parameters are counted there."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import add_adapter
from cera_train.adapters.config import AdapterConfig
from cera_train.cera.bypass import bypassed
from cera_train.common.errors import UserError
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.architecture import attention_for
from cera_train.model.config import ModelConfig, Quantization
from cera_train.model.precision import choose_precision
from cera_train.model.weights import positions_of
from cera_train.planning.config_json import read_config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double quantisation)."""


@dataclass(frozen=True)
class Parameters:
    frozen: dict[str, int]
    """Parameters of the base by kind of module."""
    adapter: dict[str, int]
    """Trainable parameters by target."""
    trainable_tensors: list[int]
    weight_bytes: float
    """Bytes of the base's weights as they are stored."""
    vocab_size: int
    """Rows of the head."""
    trains_head: bool
    positions: int | None
    """Tokens that the model has places for. None: no limit."""

    @property
    def trainable(self) -> int:
        return sum(self.trainable_tensors)

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / (self.trainable + sum(self.frozen.values()))


def remembered(function: Callable) -> Callable:
    """Keeps results by the text of the arguments: jobs of a sweep and remedies of a plan share most of them."""
    results: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return call


@remembered
def count_parameters(model: ModelConfig, adapter: AdapterConfig) -> Parameters:
    """Builds the base and the adapter and counts them.

    Raises:
        UserError: the architecture is unknown or no decoder-only language model, or a target matches no module.
    """
    base = build_base(model)
    frozen, weight_bytes = frozen_parameters(base), stored_bytes(base, model.quantization)
    vocab_size = base.get_output_embeddings().weight.shape[0]
    adapted = build_adapter(base, adapter)
    return Parameters(
        frozen=frozen,
        adapter=trainable_by_target(adapted),
        trainable_tensors=[weight.numel() for weight in adapted.parameters() if weight.requires_grad],
        weight_bytes=weight_bytes,
        vocab_size=vocab_size,
        trains_head=any(weight.requires_grad for weight in base.get_output_embeddings().parameters()),
        positions=positions_of(base.config),
    )


def build_base(model: ModelConfig) -> PreTrainedModel:
    """The base model, frozen, as `load_model` gives it."""
    quiet_libraries()
    config = read_config(model)
    if config.is_encoder_decoder:
        raise UserError(
            f"model.path={model.path} is an encoder-decoder ({config.model_type}), and cera-train trains decoder-only "
            "language models. Choose one of those."
        )
    # Others may need a package or a GPU that this machine lacks; `micro_batches` knows what they save.
    attention = attention_for(config, "eager" if model.attn_implementation == "eager" else "sdpa")
    with failing_in_one_line(model, config.model_type), torch.device("meta"):
        dtype = getattr(torch, choose_precision(model.dtype, cuda=False).dtype)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    base.requires_grad_(False)
    if model.gradient_checkpointing:  # before the adapter: PEFT then lets gradients reach the first layer's input
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def build_adapter(base: PreTrainedModel, adapter: AdapterConfig) -> nn.Module:
    with torch.device("meta"):
        return add_adapter(base, adapter).train()


@contextlib.contextmanager
def failing_in_one_line(model: ModelConfig, model_type: str) -> Iterator[None]:
    """Turns whatever the code of an architecture raises without weights into a UserError."""
    try:
        yield
    except Exception as error:
        if "attention implementation" in str(error):
            raise UserError(
                f"model.attn_implementation={model.attn_implementation}: a model of type {model_type} does not support "
                "it. Set model.attn_implementation=eager."
            ) from error
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"model.path={model.path}: cera-plan cannot run a model of type {model_type} without its weights "
            f"({type(error).__name__}: {reason})."
        ) from error


def frozen_parameters(base: PreTrainedModel) -> dict[str, int]:
    """The base's parameters by kind of module. A tied head has none: they count as the embeddings'."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in base.named_modules():
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                counts[_kind(name, module, base)] += weight.numel()
    return dict(counts) | {"head": counts["head"]}


def _kind(name: str, module: nn.Module, base: PreTrainedModel) -> str:
    """A module's row in the table: a name that is common to all architectures where there is one, else its last."""
    *path, last = name.split(".")
    if module is base.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if {"mlp", "experts", "feed_forward"} & {*path, last}:
        return "MLP"
    return f"attention {last}" if any("attn" in part or "attention" in part for part in path) else last


def trainable_by_target(adapted: nn.Module) -> dict[str, int]:
    """Trainable parameters by the last name of the module that they adapt, or that they are in."""
    targets = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    counts: Counter[str] = Counter()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            owners = [name[:end] for end in range(len(name)) if name[end] == "."]
            owner = next((owner for owner in reversed(owners) if owner in targets), owners[-1])
            counts[owner.rpartition(".")[2]] += weight.numel()
    return dict(counts)


def quantised_linears(base: PreTrainedModel) -> list[nn.Module]:
    """The linears that bitsandbytes quantises: all but the head and those that the model reads past their module."""
    head, kinds = base.get_output_embeddings(), {name.rpartition(".")[2] for name in bypassed(base)}
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and name.rpartition(".")[2] not in kinds
    ]


def stored_bytes(base: PreTrainedModel, quantization: Quantization) -> float:
    whole = sum(weight.nbytes for weight in base.parameters())
    weights = [module.weight for module in quantised_linears(base)]
    rest, numbers = whole - sum(weight.nbytes for weight in weights), sum(weight.numel() for weight in weights)
    if quantization == Quantization.nf4:
        return rest + numbers * NF4_BITS / 8
    if quantization == Quantization.int8:  # a float32 scale for every row
        return rest + numbers + 4 * sum(weight.shape[0] for weight in weights)
    return whole
