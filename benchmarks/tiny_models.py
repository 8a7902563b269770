"""A tiny random model of any causal type that transformers can build: the default config of its
class, shrunk by what its fields are called."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cera_train.model.weights import auto_class

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

GREATEST = {
    "bos_token_id": 0,
    "(eos|pad|sep|cls|eod|forced_eos|decoder_start)_token_id": 1,
    ".*_(id|index)": 9,
    ".*vocab.*": 512,
    ".*positions?(_embeddings)?|n_ctx|max_seq_len|context_length|model_max_length": 256,
    "(mamba_n|mamba_num|n_mamba|num)_heads": 8,
    ".*head_?(dim|size)|.*d_head|dim_head|.*d_state|.*state_size|kv_channels|rotary_dim": 16,
    "linear_num_key_heads|.*(key_value|kv)_heads|.*query_groups": 2,
    ".*heads?": 4,
    ".*layers|n_layer|num_blocks|layer_group_size|.*_period": 2,
    ".*per_tok(en)?|.*top_?k|moe_k": 2,
    ".*(shared_experts|n_group|expert_group|topk_group)|first_k_dense_replace|.*_offset": 1,
    ".*experts|zero_expert_num": 4,
    ".*(intermediate_size.*|ffn_dim|ffn_hidden_size|feed_forward_size)|dff|dim_ff|d_inner": 128,
    ".*(hidden_size|n_embd|d_model|emb(ed)?_dim|embedding_(size|dim)|proj_dim|width|d_ssm)": 64,
    ".*window.*|.*local_attention|attention_chunk_size": 6,
    ".*rank|chunk_size": 8,
}
"""The greatest value of the integer fields of a tiny config, by the first pattern that their name
matches. Other integers keep their values."""

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
"""Of a Llama or Qwen."""

NUMBERS_OF_LAYERS = ".*layers|n_layer|num_blocks|layer_group_size"
SMALL = 20_000_000
"""Parameters up to which a model of the default config counts as tiny."""


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """The random model, frozen and in eval mode, with `changes` of its config.

    Raises:
        Exception: whatever transformers raises where it builds or runs none of the candidates.
    """
    errors = []
    for candidate in (shrunk, _shrunk_and_filled, _all_layers, _default):
        try:
            config = candidate(CONFIG_MAPPING[model_type](), changes)
            torch.manual_seed(0)
            model = auto_class(config).from_config(config).eval()
            _draw(model.requires_grad_(False))
            model(input_ids=torch.arange(8)[None], use_cache=False)
            return model
        except Exception as error:  # transformers raises any
            errors.append(error)
    raise errors[0]


@torch.no_grad()
def _draw(model: PreTrainedModel) -> None:
    """Draws matrices large enough that every part of the model shows in its logits, and what starts
    at zero, as biases and the decay of a state."""
    for weight in model.parameters():
        if weight.ndim > 1 or not weight.any():
            weight.normal_(std=0.2)


def byte_tokenizer(*special: str, **settings: Any) -> PreTrainedTokenizerFast:
    """A token for each of these, one for the end and for padding, then one for each byte."""
    tokens = [*special, "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="</s>", pad_token="</s>", **settings
    )


def save_random(folder: Path, kind: str = "llama", seed: int = 0, **sizes: Any) -> None:
    """A folder with a tokenizer of bytes and a random model of its vocabulary."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tokens = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **tokens, **sizes)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# --- candidates -----------------------------------------------------------------------------------


def shrunk(default: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A default config, shrunk."""
    return type(default)(**(_shrink(default) | changes))


def _shrunk_and_filled(default: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """With values where the class has none, though its model needs them."""
    settings = _shrink(default)
    for name, value in settings.items():
        if value is None and name == "layer_types":
            settings[name] = ["full_attention"] * 2
        elif value is None and not re.search("token|type", name):
            settings[name] = _greatest(name)
    return type(default)(**(settings | changes))


def _all_layers(default: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """With all layers, where other fields depend on their number."""
    return type(default)(**(_shrink(default, fewer_layers=False) | changes))


def _default(default: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    config = type(default)(**({"is_decoder": True} if _may_decode(default) else {}) | changes)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    if model.num_parameters() > SMALL:
        raise ValueError("no tiny model")
    return config


def _shrink(default: PretrainedConfig, fewer_layers: bool = True) -> dict[str, Any]:
    """The arguments of a tiny config. It keeps one layer of each kind, and at least two layers."""
    values = {
        field.name: vars(default).get(default.attribute_map.get(field.name, field.name))
        for field in dataclasses.fields(default)
        if field.init and field.name not in ("id2label", "label2id")
    }
    layers_name = default.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = values.get(layers_name) or 0
    by_layer = {name: value for name, value in values.items() if _is_by_layer(value, count)}
    of_layers = {name: value for name, value in values.items() if _is_of_layers(value, count)}
    kept = _layers_by_kind(by_layer, of_layers, count) if fewer_layers else []

    settings = {}
    for field in dataclasses.fields(default):
        name = field.name
        if name not in values:
            continue
        value = values[name]
        if kept and name in of_layers:
            settings[name] = [kept.index(layer) for layer in value if layer in kept]
        elif kept and name in by_layer:
            settings[name] = [_at_most(name, value[layer]) for layer in kept]
        elif isinstance(value, PretrainedConfig):
            settings[name] = type(value)(**_shrink(value, fewer_layers))
        elif name.endswith("_token_id") and isinstance(value, list):
            settings[name] = 1
        elif name.endswith("layer_indices") and value is None:
            settings[name] = [1]  # layers of a second kind
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif re.fullmatch(NUMBERS_OF_LAYERS, name) and not fewer_layers:
            settings[name] = value
        elif field.default is not None or value is None or isinstance(value, list | dict):
            settings[name] = _at_most(name, value)
        # Else the class derives the value, from what is shrunk here.
    if kept:
        settings[layers_name] = len(kept)
    elif fewer_layers and count:  # a pattern of kinds, which repeats
        settings[layers_name] = max(2, *map(_kinds_in_turn, values.values()))
    key_value_heads = values.get("num_key_value_heads")
    if key_value_heads is not None and key_value_heads == values.get("num_attention_heads"):
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if _may_decode(default):
        settings["is_decoder"] = True
    return settings


def _kinds_in_turn(value: Any) -> int:
    is_pattern = isinstance(value, list | tuple) and all(type(item) is str for item in value)
    return len(value) if is_pattern else 0


def _may_decode(config: PretrainedConfig) -> bool:
    """Whether it is that of an encoder, such as BERT, which attends both ways by default."""
    return "is_decoder" in vars(config) and not config.is_encoder_decoder


def _is_by_layer(value: Any, count: int) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == count and not _is_of_layers(value, count)
    )


def _is_of_layers(value: Any, count: int) -> bool:
    """Whether it lists numbers of layers."""
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        return False
    return bool(value) and list(value) == sorted(set(value)) and value[-1] < count


def _layers_by_kind(by_layer: dict[str, Any], of_layers: dict[str, Any], count: int) -> list[int]:
    """The first layer of each kind; two of the only one. Empty where no field tells layers
    apart."""
    if not (by_layer or of_layers):
        return []
    kinds = {}
    for layer in range(count):
        kind = [value[layer] for value in by_layer.values()]
        kind += [layer in value for value in of_layers.values()]
        kinds.setdefault(repr(kind), layer)
    kept = sorted(kinds.values())
    return kept if len(kept) > 1 else [kept[0], kept[0] + 1]


def _at_most(name: str, value: Any) -> Any:
    greatest = _greatest(name)
    is_size = type(value) is int and greatest is not None
    return min(value, greatest) if is_size else value


def _greatest(name: str) -> int | None:
    matches = (most for pattern, most in GREATEST.items() if re.fullmatch(pattern, name))
    return next(matches, None)
