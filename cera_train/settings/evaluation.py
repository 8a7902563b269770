"""Settings of `cera-eval`: the model that it measures, a task, how answers are generated."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from cera_train.common.settings import MISSING, require, section, setting
from cera_train.settings.data import DataConfig
from cera_train.settings.distributed import ProcessesConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.values import Address, FolderName, Growth, Part, Settings

Grader = StrEnum("Grader", ["text", "number", "math", "choice"])


@dataclass
class TaskConfig(Settings):
    kind: str = setting(MISSING, "answers")
    """The file of cera_train/evaluation/tasks/ that defines the task. math, gsm8k, logistic_map,
    jsonl, held_out: problems to answer; perplexity: rows as in training, or windows
    of running text."""
    name: FolderName = setting(MISSING, "answers")
    """Results go to RUN/eval/name."""
    path: str | None = setting(None, "answers")
    """A data set's id on the Hub. Not needed with files."""
    subset: str | None = setting(None, "answers")
    split: str = setting("test", "answers")
    files: list[str] = setting(list, "answers")
    """jsonl, json, csv or parquet files with the same columns; for running text also .txt."""
    limit: PositiveInt | None = setting(None, "answers")
    """Takes only the first problems, rows or windows. null: all."""
    prompt: str | None = setting(None, "answers")
    """Template with {column} for a row's columns."""
    level: int | None = setting(None, "answers")
    """Takes only the problems of this level, for math. null: all."""
    growths: list[Growth] = setting(list, "answers")
    """Values of r in x' = r x (1 - x), for logistic_map."""
    question: str | None = setting(None, "answers")
    """The column with the question, for jsonl."""
    answer: str | None = setting(None, "answers")
    """The column with the gold answer, for jsonl."""
    grader: Grader | None = setting(None, "answers")
    """The rule that compares an answer with the gold answer, for jsonl."""
    max_new_tokens: PositiveInt = setting(1024, "answers")
    window: PositiveInt | None = setting(None, "answers")
    """Tokens in a window of running text, for perplexity: every token but a window's first is
    predicted. null: rows."""
    stop: list[Annotated[str, Field(min_length=1)]] = setting(list, "answers")
    """Texts that end an answer, beside the end token, for models that do not stop."""


@dataclass
class GenerationConfig(Settings):
    """How answers are generated."""

    samples: PositiveInt = setting(1, "answers")
    """Answers to each problem."""
    temperature: NonNegativeFloat = setting(0.0, "answers")
    """0: greedy."""
    top_p: Part = setting(1.0, "answers")
    """Samples from the likeliest tokens whose probabilities add up to this."""
    seed: int = setting(0, "answers")
    """A sample's random numbers depend on (seed, problem, sample) alone."""
    batch_tokens: PositiveInt = setting(65_536, "cost")
    """Tokens of a batch, padding and answers included. Lower it where a GPU's memory does not hold
    their keys and values: a Llama of 8B takes 128 KiB a token."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0 or (self.samples == 1 and self.top_p == 1),
            f"generation.samples={self.samples} and generation.top_p={self.top_p} change nothing "
            "for greedy answers: choose generation=sample, or set generation.temperature.",
        )


@dataclass
class SubjectConfig(Settings):
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
    server: Address | None = setting(None, "nothing")
    """Address of a vLLM that answers, such as http://localhost:8000. null: the model in this
    process."""

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
class EvalConfig(SubjectConfig):
    task: TaskConfig | None = section(None)
    generation: GenerationConfig = section()
    data: DataConfig | None = section(None)
    """The data set whose held-out rows task=perplexity predicts. null: the run's."""
    launch: ProcessesConfig = section(ProcessesConfig)
    name: FolderName | None = setting(None, "nothing")
    """Results go to RUN/eval/name. null: the task's name."""
    adapter_digest: str | None = setting(None, "answers")
    """Digest of the adapter's weights. cera-eval fills it in."""
    engine: str | None = setting(None, "answers")
    """What answers, such as vllm 0.32.0. cera-eval fills it in. null: the model in this process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task is not None, "task=... is missing: `cera-eval --help` lists the tasks.")
        if self.server is not None:
            require(
                self.task.kind != "perplexity",
                f"server={self.server} answers problems, and task={self.task.name} measures "
                "losses: leave out server=.",
            )
            self.launch = ProcessesConfig("1")  # which asks the server
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
