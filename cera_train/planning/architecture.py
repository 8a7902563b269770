"""A model's linear projections and parameter counts from its config.json alone: no weights, no torch.

Llama and its relatives: token embeddings, layers of grouped-query attention and a gated MLP, each behind a norm, a last
norm, a head.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cera_train.adapters.config import AdapterConfig, AdapterKind
from cera_train.common.errors import UserError
from cera_train.common.files import cache_dir
from cera_train.model.config import ModelConfig, ModelFacts

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Linear:
    """A linear projection of the base model."""

    name: str
    """Its whole name, such as model.layers.0.self_attn.q_proj."""
    d_in: int
    d_out: int
    has_bias: bool = False
    reads: str = ""
    """Which tensor it reads: projections that read the same one share what autograd saves of it."""

    @property
    def kind(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """None: the head, which is in no layer."""
        match = re.search(r"\.layers\.(\d+)\.", self.name)
        return int(match[1]) if match else None

    @property
    def weights(self) -> int:
        return self.d_in * self.d_out

    @property
    def parameters(self) -> int:
        return self.weights + self.d_out * self.has_bias


# --- facts -----------------------------------------------------------------------------------------------------------


def model_facts(config: ModelConfig) -> ModelFacts:
    """The architecture of `model.path`: `model.facts` where they are of that path, else its config.json on this disk.

    Raises:
        ValueError: there are no facts of this model, or it is of an unknown type.
    """
    if config.facts is not None and config.facts.of == config.path:
        _check_type(config.facts)
        return config.facts
    folder = _folder(config.path)
    if folder is not None and (folder / "config.json").is_file():
        try:
            config_json = json.loads((folder / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{folder / 'config.json'} is not JSON: {error}.") from error
        return facts_of(config_json, config.path)
    others = f"; those given are of {config.facts.of}" if config.facts is not None else ""
    raise UserError(
        f"cera-plan has no facts of model.path={config.path!r}{others}. Set model.path to a local folder with its "
        "config.json, or write model.facts for it in a file of conf/model."
    )


def _folder(path: str) -> Path | None:
    """Where a model lies on this disk."""
    if not path.startswith("pypi:"):
        return Path(path) if Path(path).is_dir() else None
    module = path.removeprefix("pypi:").replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return cache_dir() / "models" / files[0].stem if files else None  # what model.py converts it to


def facts_of(config_json: dict[str, Any], path: str) -> ModelFacts:
    """The facts in a model's config.json, with transformers' defaults for what it leaves out.

    Raises:
        ValueError: something is missing, or the model is of an unknown type.
    """
    known = {field.name for field in fields(ModelFacts)} - {"of", "license"}
    values = {name: value for name, value in config_json.items() if name in known and value is not None}
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("tie_word_embeddings", False)
    if heads and hidden:
        values.setdefault("head_dim", 128 if values.get("model_type") == "qwen3" else hidden // heads)
    missing = sorted(known - values.keys() - {"attention_bias", "mlp_bias"})
    if missing:
        raise UserError(f"the config.json of model.path={path!r} does not say {', '.join(missing)}.")
    facts = ModelFacts(of=path, **values)
    _check_type(facts)
    return facts


def _check_type(facts: ModelFacts) -> None:
    if facts.model_type not in MODEL_TYPES:
        raise UserError(
            f"cera-plan does not know models of type {facts.model_type!r}, such as {facts.of}: it knows "
            f"{', '.join(MODEL_TYPES)}."
        )


# --- parameters ------------------------------------------------------------------------------------------------------


def linears(facts: ModelFacts) -> list[Linear]:
    """Every linear projection, the head last."""
    hidden, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = (heads * facts.head_dim for heads in (facts.num_attention_heads, facts.num_key_value_heads))
    qkv_bias = facts.model_type == "qwen2" or (facts.attention_bias and facts.model_type != "mistral")
    o_bias = facts.attention_bias and facts.model_type in ("llama", "qwen3")
    mlp_bias = facts.mlp_bias and facts.model_type == "llama"
    layers = []
    for layer in range(facts.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        layers += [
            Linear(f"{attention}.q_proj", hidden, queries, qkv_bias, "attention input"),
            Linear(f"{attention}.k_proj", hidden, keys, qkv_bias, "attention input"),
            Linear(f"{attention}.v_proj", hidden, keys, qkv_bias, "attention input"),
            Linear(f"{attention}.o_proj", queries, hidden, o_bias, "attention output"),
            Linear(f"{mlp}.gate_proj", hidden, inner, mlp_bias, "MLP input"),
            Linear(f"{mlp}.up_proj", hidden, inner, mlp_bias, "MLP input"),
            Linear(f"{mlp}.down_proj", inner, hidden, mlp_bias, "MLP product"),
        ]
    return [*layers, Linear("lm_head", hidden, facts.vocab_size, False, "last hidden state")]


def frozen_parameters(facts: ModelFacts) -> dict[str, int]:
    """Parameters of the base model by kind of module. A tied head has none of its own."""
    counts = {"embeddings": facts.vocab_size * facts.hidden_size}
    mlp = 0
    for linear in linears(facts):
        if linear.reads.startswith("attention"):
            counts[f"attention {linear.kind}"] = counts.get(f"attention {linear.kind}", 0) + linear.parameters
        elif linear.reads.startswith("MLP"):
            mlp += linear.parameters
    norms = (2 * facts.num_hidden_layers + 1) * facts.hidden_size
    if facts.model_type == "qwen3":  # norms of queries and keys
        norms += 2 * facts.num_hidden_layers * facts.head_dim
    head = 0 if facts.tie_word_embeddings else facts.vocab_size * facts.hidden_size
    return counts | {"MLP": mlp, "norms": norms, "head": head}


def adapted_linears(facts: ModelFacts, adapter: AdapterConfig) -> list[Linear]:
    """The projections that an adapter stands on, by PEFT's rules.

    Raises:
        ValueError: a target matches none, or a layer is outside the model.
    """
    every, targets = linears(facts), adapter.target_modules
    if isinstance(targets, list):
        unmatched = [target for target in targets if not any(_ends_with(linear.name, target) for linear in every)]
        adapted = [linear for linear in every if any(_ends_with(linear.name, target) for target in targets)]
    elif targets == "all-linear":
        unmatched, adapted = [], [linear for linear in every if linear.layer is not None]
    else:
        adapted = [linear for linear in every if re.fullmatch(targets, linear.name)]
        unmatched = [] if adapted else [targets]
    if unmatched:
        kinds = dict.fromkeys(linear.kind for linear in every)
        raise UserError(
            f"adapter.target_modules: {', '.join(map(repr, unmatched))} matches no module of this model. "
            f"Its linear projections are {', '.join(kinds)}."
        )
    if adapter.layers is None:
        return adapted
    outside = [layer for layer in adapter.layers if not 0 <= layer < facts.num_hidden_layers]
    if outside:
        raise UserError(f"adapter.layers: {outside} is outside this model's layers 0 to {facts.num_hidden_layers - 1}.")
    # PEFT's LoRA takes a module named whole in whatever layer; our CeRA does not.
    named = targets if isinstance(targets, list) and adapter.kind != AdapterKind.cera else []
    adapted = [linear for linear in adapted if linear.layer in adapter.layers or linear.name in named]
    if not adapted:
        raise UserError(f"adapter.target_modules={targets} has no module in adapter.layers={adapter.layers}.")
    return adapted


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_tensors(linear: Linear, kind: AdapterKind, r: int) -> list[int]:
    """The sizes of an adapter's tensors on one projection: A [r, d_in], B [d_out, r], DoRA's magnitude [d_out]."""
    magnitude = [linear.d_out] if kind == AdapterKind.dora else []
    return [r * linear.d_in, linear.d_out * r, *magnitude]


def adapter_parameters(adapted: list[Linear], kind: AdapterKind, r: int) -> dict[str, int]:
    """Trainable parameters by kind of projection."""
    counts: dict[str, int] = {}
    for linear in adapted:
        counts[linear.kind] = counts.get(linear.kind, 0) + sum(adapter_tensors(linear, kind, r))
    return counts


def rank_for_budget(adapted: list[Linear], kind: AdapterKind, parameters: int) -> int:
    """The rank whose adapter comes closest to so many parameters."""
    per_rank = sum(linear.d_in + linear.d_out for linear in adapted)
    fixed = sum(linear.d_out for linear in adapted) if kind == AdapterKind.dora else 0
    return max(1, round((parameters - fixed) / per_rank))
