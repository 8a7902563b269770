"""The base of a run on the meta device, which has shapes and no memory."""

import contextlib
import json
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cera_train.adapters.build import build, parameter_counts
from cera_train.cera.coverage import bypassed_projections
from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.folder import load_config
from cera_train.model.lean import keep_less
from cera_train.model.precision import choose_precision
from cera_train.model.weights import attention_for
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.run import Config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double
quantisation)."""


def trainable_parameters(config: Config) -> int:
    with torch.device("meta"):
        return parameter_counts(build(build_base(config.model), config.adapter))[0]


def build_base(model: ModelConfig) -> PreTrainedModel:
    """The frozen base, as `load_model` gives it."""
    quiet_libraries()
    config = read_config(model)
    if config.is_encoder_decoder:
        raise UserError(
            f"model.path={model.path} is an encoder-decoder ({config.model_type}), and cera-train "
            f"trains decoder-only "
            "language models. Choose one of those."
        )
    # Flash kernels may need a package or a GPU that this machine lacks; they keep what sdpa keeps.
    attention = attention_for(config, "eager" if model.attn_implementation == "eager" else "sdpa")
    dtype = getattr(torch, choose_precision(model.dtype, cuda=False).value)
    with errors_in_one_line(model, config.model_type), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        )
    base.requires_grad_(False)
    keep_less(base)
    if (
        model.gradient_checkpointing
    ):  # before the adapter: PEFT then lets gradients reach the first layer's input
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The config.json of conf/model, else that of `model.path`."""
    if model.facts is not None and model.facts.config is not None:
        return AutoConfig.for_model(
            **json.loads((config_dir("conf") / "model" / model.facts.config).read_text())
        )
    return load_config(model)


@contextlib.contextmanager
def errors_in_one_line(model: ModelConfig, model_type: str) -> Iterator[None]:
    """Turns whatever the code of an architecture raises without weights into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"model.path={model.path}: cera-plan cannot run a model of type {model_type} without "
            f"its weights "
            f"({type(error).__name__}: {reason})."
        ) from error


def stored_sizes(base: PreTrainedModel, quantization: Quantization) -> dict[nn.Parameter, float]:
    """Bytes of each weight of the base as it is stored."""
    sizes: dict[nn.Parameter, float] = {weight: weight.nbytes for weight in base.parameters()}
    for linear in quantised_linears(base, quantization):
        numbers = linear.weight.numel()
        rows = len(linear.weight)
        is_4bit = quantization == Quantization.nf4
        sizes[linear.weight] = numbers * NF4_BITS / 8 if is_4bit else numbers + 4 * rows
    return sizes


def quantised_linears(base: PreTrainedModel, quantization: Quantization) -> list[nn.Module]:
    """The linears that bitsandbytes quantises: all but the head and those that the model reads past
    their module."""
    if quantization == Quantization.none:
        return []
    head = base.get_output_embeddings()
    kinds = {name.rpartition(".")[2] for name in bypassed_projections(base)}
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name.rpartition(".")[2] not in kinds
    ]
