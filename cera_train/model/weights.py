"""Base weights, in 32, 16 or 4 bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from cera_train.cera.coverage import bypassed_projections
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.model.folder import from_hub_or_folder, load_architecture
from cera_train.model.lean import keep_less
from cera_train.model.precision import choose_precision
from cera_train.settings.model import ModelConfig, Quantization


def load_model(
    config: ModelConfig, device: torch.device, will_be_sharded: bool = False
) -> PreTrainedModel:
    """The frozen base model on `device`.

    A model that will be sharded stays in CPU memory, since the whole may not fit the device, unless
    it is quantised: quantising needs the device.

    Raises:
        UserError: the model cannot be found, reached or used.
    """
    architecture = load_architecture(config)
    is_quantised = config.quantization != Quantization.none
    dtype = getattr(torch, choose_precision(config.dtype, torch.device(device)).value)
    quantising = {}
    if not _is_stored_quantised(architecture, config) and is_quantised:
        skip = left_unquantised(architecture)
        quantising["quantization_config"] = nf4_config(dtype, will_be_sharded, skip)
    model, loading = from_hub_or_folder(
        auto_class(architecture).from_pretrained,
        config,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attention_for(architecture),
        **quantising,
        device_map={"": "cpu" if will_be_sharded and not is_quantised else device},
        # Reading a pickle can run code. A user who trusts the model's code can trust its pickles
        # too.
        use_safetensors=None if config.trust_remote_code else True,
    )
    _check_all_loaded(model, loading["missing_keys"], config)
    if is_quantised:
        keep_4bit_weights(model)
    freeze(model, config)
    return model


def freeze(model: PreTrainedModel, config: ModelConfig) -> None:
    """Makes a model the frozen base of a run. Raises UserError if it cannot recompute activations,
    and should."""
    model.requires_grad_(False)
    keep_less(model)
    # Before the adapter: PEFT then lets gradients reach the first layer's input.
    if config.gradient_checkpointing:
        require(
            model.supports_gradient_checkpointing,
            f"model.gradient_checkpointing=true: {type(model).__name__} of transformers cannot "
            "recompute activations. Leave it out, or lower train.micro_batch_tokens.",
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})


def auto_class(config: transformers.PretrainedConfig) -> type:
    """transformers' class that builds and loads this architecture. A model that also takes images
    trains on text, as a whole where its language model is no type of its own (Mistral 3)."""
    is_multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if is_multimodal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def model_class(config: transformers.PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of this architecture; None if its code comes with the model."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def decoder_of(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """Its layers, without the head and what reads images or sound."""
    decoder = causal_lm.get_decoder()
    # ModernBERT's head has that name.
    return decoder if isinstance(decoder, PreTrainedModel) else causal_lm.base_model


def layer_classes(model: PreTrainedModel) -> set[str]:
    """The names of the classes of a model's layers."""
    # transformers and Accelerate name them so; there is no public name.
    return set(model._no_split_modules or ())


def attention_for(config: transformers.PretrainedConfig) -> str:
    """transformers' attention for this architecture: sdpa, or eager if it has no sdpa (Bloom,
    gpt-oss, Mamba) or caps its scores, which sdpa leaves out."""
    kind = model_class(config)
    if kind is None:
        return "sdpa"
    # Only `_supports_sdpa` of its class tells whether a model has sdpa; transformers below 5.22
    # claims it for Gemma 2.
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if kind._supports_sdpa and not is_capped else "eager"


def left_unquantised(config: transformers.PretrainedConfig) -> list[str] | None:
    """Names of the modules that stay in 16 bits. None lets transformers choose: the head."""
    if (kind := model_class(config)) is None:
        return None
    with torch.device("meta"):
        model = kind(config)
    return sorted(unquantised(model)) if bypassed_projections(model) else None


def unquantised(model: PreTrainedModel) -> set[str]:
    """Names of the projections that quantising leaves out: the last names of those whose weights
    the model reads without calling them (Mamba), and the head."""
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    return heads | {name.rpartition(".")[2] for name in bypassed_projections(model)}


def _is_stored_quantised(architecture: transformers.PretrainedConfig, config: ModelConfig) -> bool:
    """Whether the files hold quantised weights. Raises UserError if `model.quantization` differs
    from their kind; weights of another library than bitsandbytes count as `none`: transformers
    dequantises or refuses them."""
    settings = getattr(architecture, "quantization_config", None)
    if settings is None:
        return False
    require(
        not settings.get("load_in_8bit"),
        f"model.path={config.path}: its weights are stored in 8 bits: name the model in 16 bits, "
        "and set model.quantization=nf4 for 4.",
    )
    kind = Quantization.nf4 if settings.get("load_in_4bit") else Quantization.none
    if kind != config.quantization:
        stored = settings.get("quant_method") if kind == Quantization.none else kind
        raise UserError(
            f"model.path={config.path}: its weights are stored as {stored}: set "
            f"model.quantization={kind}."
        )
    return True


def mixes_sequences(model: PreTrainedModel) -> bool:
    """Whether sequences that share a row are likely to see each other, since layers carry a state
    or a convolution from token to token, or the model takes no positions. Only `layout.probe`
    verifies this."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    decoder = decoder_of(model)
    modules = [*decoder.modules()]
    is_convolved = any(isinstance(module, nn.Conv1d) for module in modules)
    attends = any(hasattr(module, "is_causal") for module in modules)
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
    is_stateful = is_convolved or not attends or "linear_attention" in kinds
    return is_stateful or not takes_positions


def nf4_config(
    dtype: torch.dtype, will_be_sharded: bool = False, skip: list[str] | None = None
) -> BitsAndBytesConfig:
    """bitsandbytes' settings: NF4 with double quantisation, computing in `dtype`. `skip` names
    modules that are not quantised; None: the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The bits are the same; FSDP shards floats only.
        bnb_4bit_quant_storage=dtype if will_be_sharded else torch.uint8,
        llm_int8_skip_modules=skip,
    )


def quantization_of(base: PreTrainedModel) -> Quantization | None:
    """How the weights of a loaded model are quantised; None where they are not."""
    return Quantization.nf4 if getattr(base, "is_loaded_in_4bit", False) else None


def keep_4bit_weights(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights. On a CPU with AVX512-BF16 it does so for
    good at their first call in eval mode, for a kernel that computes in bfloat16 and has no
    backward: training after an evaluation would get wrong gradients, with only a warning."""
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
