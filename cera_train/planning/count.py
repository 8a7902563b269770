"""The base and the adapter of a run on the meta device, which has shapes and no memory, and their parameters.

config.json comes from the model's folder, the Hub's cache on this disk, or conf/model, never from a network.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import build
from cera_train.cera.coverage import bypassed_projections
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.lean import keep_less
from cera_train.model.precision import choose_precision
from cera_train.model.weights import attention_for, mixes_sequences, positions_of
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.run import Config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double quantisation)."""


@dataclass(frozen=True)
class Parameters:
    frozen: dict[str, int]
    """Parameters of the base by kind of module."""
    adapter: dict[str, int]
    """Trainable parameters by the last name of the module that they adapt, or that they are in."""
    sides: dict[str, int]
    """in + out of the base's matrices by the last name of their module: the parameters of a LoRA of rank 1."""
    weight_bytes: float
    """Bytes of the base's weights as they are stored."""
    positions: int | None
    """Tokens that the model has positions for. None: no limit."""
    layers: int
    mixes_sequences: bool
    """Rows are padded: the model carries a state from token to token."""

    @property
    def trainable(self) -> int:
        return sum(self.adapter.values())

    @property
    def share(self) -> float:
        return self.trainable / (self.trainable + sum(self.frozen.values()))


def count_parameters(model: ModelConfig, adapter: AdapterConfig) -> Parameters:
    """Builds the base and the adapter and counts their parameters."""
    return build_counted(build_base(model), model, adapter)[1]


def build_counted(base: PreTrainedModel, model: ModelConfig, adapter: AdapterConfig) -> tuple[nn.Module, Parameters]:
    """The base with its adapter, and their parameters."""
    frozen, sides, weight_bytes = (
        by_kind(base),
        sides_by_name(base),
        sum(stored_sizes(base, model.quantization).values()),
    )
    is_mixing = mixes_sequences(base)
    with torch.device("meta"):
        adapted = build(base, adapter).train()
    return adapted, Parameters(
        frozen=frozen,
        adapter=trainable_by_target(adapted),
        sides=sides,
        weight_bytes=weight_bytes,
        positions=positions_of(base.config),
        layers=base.config.get_text_config().num_hidden_layers,
        mixes_sequences=is_mixing,
    )


def trainable_parameters(config: Config) -> int:
    return count_parameters(config.model, config.adapter).trainable


# --- building --------------------------------------------------------------------------------------------------------


def build_base(model: ModelConfig) -> PreTrainedModel:
    """The frozen base, as `load_model` gives it."""
    quiet_libraries()
    config = read_config(model)
    if config.is_encoder_decoder:
        raise UserError(
            f"model.path={model.path} is an encoder-decoder ({config.model_type}), and cera-train trains decoder-only "
            "language models. Choose one of those."
        )
    # Flash kernels may need a package or a GPU that this machine lacks; they keep what sdpa keeps.
    attention = attention_for(config, "eager" if model.attn_implementation == "eager" else "sdpa")
    with failing_in_one_line(model, config.model_type), torch.device("meta"):
        dtype = getattr(torch, choose_precision(model.dtype, cuda=False).dtype)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    base.requires_grad_(False)
    keep_less(base)
    if model.gradient_checkpointing:  # before the adapter: PEFT then lets gradients reach the first layer's input
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The config of `model.path`. Raises UserError where this disk has none, or transformers does not know its type."""
    try:
        if not model.path.startswith("pypi:"):  # trust_remote_code: a plan runs no code that comes with a model
            settings = {"revision": model.revision, "local_files_only": True, "trust_remote_code": False}
            return AutoConfig.from_pretrained(model.path, **settings)
    except (OSError, ValueError, KeyError) as error:
        is_local = Path(model.path).is_dir()
        if is_local or not isinstance(error, OSError):
            place = f"{model.path}/config.json" if is_local else f"model.path={model.path}"
            raise UserError(f"{place} cannot be used: {_first_line(error)}") from error
    if model.facts is not None and model.facts.config is not None:
        return AutoConfig.for_model(**json.loads((config_dir("conf") / "model" / model.facts.config).read_text()))
    raise UserError(
        f"model.path={model.path}: its config.json is not on this disk. Get it with `hf download {model.path} "
        "config.json`, or set model.path to a local folder that has one."
    )


@contextlib.contextmanager
def failing_in_one_line(model: ModelConfig, model_type: str) -> Iterator[None]:
    """Turns whatever the code of an architecture raises without weights into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "attention implementation" in str(error):
            raise UserError(
                f"model.attn_implementation={model.attn_implementation}: a model of type {model_type} does not support "
                "it. Set model.attn_implementation=eager."
            ) from error
        raise UserError(
            f"model.path={model.path}: cera-plan cannot run a model of type {model_type} without its weights "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())


# --- counting --------------------------------------------------------------------------------------------------------


def by_kind(base: PreTrainedModel) -> dict[str, int]:
    """The base's parameters by kind of module. A tied head has none: they count as the embeddings'."""
    counts: Counter[str] = Counter()
    for name, weight in base.named_parameters():
        place = name.rpartition(".")[0]
        module = base.get_submodule(place)
        counts["head" if module is base.get_output_embeddings() else _kind(place, module)] += weight.numel()
    return dict(counts) | {"head": counts["head"]}


def _kind(name: str, module: nn.Module) -> str:
    """A module's row in the table: a name that is common to all architectures where there is one, else its last."""
    *path, last = name.split(".")
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
            owners = [target for target in targets if name.startswith(f"{target}.")]
            owner = max(owners, key=len, default=name.rpartition(".")[0])
            counts[owner.rpartition(".")[2]] += weight.numel()
    return dict(counts)


def sides_by_name(base: PreTrainedModel) -> dict[str, int]:
    """in + out of every matrix, those of experts and a tied head too, by the last name of its module."""
    counts: Counter[str] = Counter()
    for name, weight in base.named_parameters(remove_duplicate=False):
        if weight.ndim > 1:
            counts[name.split(".")[-2]] += math.prod(weight.shape[:-2]) * sum(weight.shape[-2:])
    return dict(counts)


def stored_sizes(base: PreTrainedModel, quantization: Quantization) -> dict[nn.Parameter, float]:
    """Bytes of each weight of the base as it is stored."""
    sizes: dict[nn.Parameter, float] = {weight: weight.nbytes for weight in base.parameters()}
    for linear in quantised_linears(base, quantization):
        numbers, rows = linear.weight.numel(), len(linear.weight)
        is_4bit = quantization == Quantization.nf4
        sizes[linear.weight] = numbers * NF4_BITS / 8 if is_4bit else numbers + 4 * rows
    return sizes


def quantised_linears(base: PreTrainedModel, quantization: Quantization) -> list[nn.Module]:
    """The linears that bitsandbytes quantises: all but the head and those that the model reads past their module."""
    if quantization == Quantization.none:
        return []
    head, kinds = base.get_output_embeddings(), {name.rpartition(".")[2] for name in bypassed_projections(base)}
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rpartition(".")[2] not in kinds
    ]
