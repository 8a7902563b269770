"""Settings of `cera-eval`: the model that it measures, a task, how answers are generated."""

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import (
    MISSING,
    require,
    require_address,
    require_folder_name,
    require_positive,
    section,
    setting,
)
from cera_train.settings.data import DataConfig
from cera_train.settings.distributed import ProcessesConfig
from cera_train.settings.model import ModelConfig

Grader = StrEnum("Grader", ["text", "number", "math", "choice"])


@dataclass
class TaskConfig:
    kind: str = setting(MISSING, "answers")
    """The file of cera_train/evaluation/tasks/ that defines the task. math, gsm8k, logistic_map,
    jsonl, held_out: problems to answer; perplexity: rows as in training, or windows
    of running text."""
    name: str = setting(MISSING, "answers")
    """Results go to RUN/eval/name."""
    path: str | None = setting(None, "answers")
    """A data set's id on the Hub. Not needed with files."""
    subset: str | None = setting(None, "answers")
    revision: str | None = setting(None, "answers")
    split: str = setting("test", "answers")
    files: list[str] = setting(list, "answers")
    """jsonl, json, csv or parquet files with the same columns; for running text also .txt."""
    limit: int | None = setting(None, "answers")
    """Takes only the first problems, rows or windows. null: all."""
    prompt: str | None = setting(None, "answers")
    """Template with {column} for a row's columns."""
    level: int | None = setting(None, "answers")
    """Takes only the problems of this level, for math. null: all."""
    growths: list[float] = setting(list, "answers")
    """Values of r in x' = r x (1 - x), for logistic_map."""
    question: str | None = setting(None, "answers")
    """The column with the question, for jsonl."""
    answer: str | None = setting(None, "answers")
    """The column with the gold answer, for jsonl."""
    grader: Grader | None = setting(None, "answers")
    """The rule that compares an answer with the gold answer, for jsonl."""
    max_new_tokens: int = setting(1024, "answers")
    window: int | None = setting(None, "answers")
    """Tokens in a window of running text, for perplexity: every token but a window's first is
    predicted. null: rows."""
    stop: list[str] = setting(list, "answers")
    """Texts that end an answer, beside the end token, for models that do not stop."""

    def __post_init__(self) -> None:
        require_positive("task", self, "limit", "max_new_tokens", "window")
        require(
            all(self.stop),
            f"task.stop={self.stop} has an empty text, which ends every answer at once: remove it.",
        )


@dataclass
class GenerationConfig:
    """How answers are generated."""

    samples: int = setting(1, "answers")
    """Answers to each problem."""
    temperature: float = setting(0.0, "answers")
    """0: greedy."""
    top_p: float = setting(1.0, "answers")
    """Samples from the likeliest tokens whose probabilities add up to this."""
    seed: int = setting(0, "answers")
    """A sample's random numbers depend on (seed, problem, sample) alone."""
    batch_tokens: int | None = setting(None, "cost")
    """Tokens of a batch if every answer were as long as it may be: bounds the memory of keys and
    values. A Llama of 8B takes 128 KiB a token. null: 4 GiB of them; on a GPU at most half of the
    free memory."""

    def __post_init__(self) -> None:
        require_positive("generation", self, "samples", "batch_tokens")
        require(
            self.temperature >= 0,
            f"generation.temperature={self.temperature} must not be negative.",
        )
        require(
            0 < self.top_p <= 1, f"generation.top_p={self.top_p} must be above 0 and at most 1."
        )
        require(
            self.temperature > 0 or (self.samples == 1 and self.top_p == 1),
            f"generation.samples={self.samples} and generation.top_p={self.top_p} change nothing "
            "for greedy answers: choose generation=sample, or set generation.temperature.",
        )


@dataclass
class SubjectConfig:
    """What `cera-eval`, `cera-chat` and `cera-export` load."""

    run: str | None = setting(None, "nothing")
    """A run's folder, an adapter's folder, or `base` for the untouched model."""
    model: ModelConfig | None = section(None)
    """null: the run's."""
    like: str | None = setting(None, "nothing")
    """With run=base, a run: the untouched model takes its model, its rows and its precision, and is
    asked as it is."""
    output_dir: str = setting("outputs", "nothing")
    """Where run=base leaves its results, in base-MODEL."""
    trust_remote_code: bool = setting(False, "nothing")
    """Runs Python code that comes with the model of a run or an adapter."""

    def __post_init__(self) -> None:
        require(
            self.run is not None,
            "run=... is missing: the folder of a run or of an adapter, or base (with "
            "model.path=FOLDER, model=NAME or like=RUN).",
        )
        require(
            self.like is None or self.run == "base",
            f"like={self.like} belongs to run=base: leave it out.",
        )
        require(
            self.run != "base" or self.model is not None or self.like is not None,
            "run=base needs model.path=FOLDER, model=NAME, such as model=smollm2_135m_pypi, or "
            "like=RUN.",
        )


@dataclass
class AnsweringConfig(SubjectConfig):
    """The subject of a command, and the engine that answers for it."""

    server: str | None = setting(None, "nothing")
    """Address of a vLLM that answers, such as http://localhost:8000. null: the model in this
    process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_address("server", self.server)


@dataclass
class EvalConfig(AnsweringConfig):
    task: TaskConfig | None = section(None)
    generation: GenerationConfig = section()
    data: DataConfig | None = section(None)
    """The data set whose held-out rows task=perplexity predicts. null: the run's."""
    launch: ProcessesConfig = section(ProcessesConfig)
    name: str | None = setting(None, "nothing")
    """Results go to RUN/eval/name. null: the task's name."""
    adapter_digest: str | None = setting(None, "answers")
    """Digest of the adapter's weights. cera-eval fills it in."""
    engine: str | None = setting(None, "answers")
    """What answers, such as vllm 0.32.0. cera-eval fills it in. null: the model in this process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task is not None, "task=... is missing: `cera-eval --help` lists the tasks.")
        require_folder_name(self.folder_name, "name" if self.name else "task.name")
        if self.server is not None:
            require(
                self.task.kind != "perplexity",
                f"server={self.server} answers problems, and task={self.task.name} measures "
                "losses: leave out server=.",
            )
            require(
                self.launch.processes in ("auto", "1"),
                f"launch.processes={self.launch.processes}: one process asks "
                f"server={self.server}. Leave one of the two out.",
            )
            self.launch = ProcessesConfig("1")
        if self.task.kind == "perplexity" and self.task.window is None:
            require(
                self.data is not None or self.run != "base" or self.like is not None,
                f"task={self.task.name} with run=base needs like=RUN, whose rows to take, or "
                f"data=....",
            )
        else:
            fix = (
                f"leave it out. `cera-eval task={self.task.name} --help` lists what this task takes"
            )
            require(self.data is None, f"data=... belongs to task=perplexity: {fix}.")

    @property
    def folder_name(self) -> str:
        return self.name or self.task.name
