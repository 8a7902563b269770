"""Settings of an evaluation: what `cera-eval` does."""

from __future__ import annotations

from dataclasses import dataclass

from cera_train.common.settings import require, require_folder_name, require_positive, section, setting
from cera_train.data.config import DataConfig
from cera_train.model.config import ModelConfig
from cera_train.tasks.config import TaskConfig, TaskKind


@dataclass
class GenerationConfig:
    """How answers are generated."""

    samples: int = setting(1, "answers")
    """Answers to every problem."""
    temperature: float = setting(0.0, "answers")
    """0: greedy."""
    top_p: float = setting(1.0, "answers")
    """Sample from the likeliest tokens that have this probability together."""
    seed: int = setting(0, "answers")
    """The random numbers of a sample follow from (seed, problem, sample)."""
    batch_tokens: int = setting(32768, "cost")
    """Tokens of one batch, prompts and answers at their longest: bounds the memory of the cache, which grows with the
    answers and seldom comes near it. A Llama of 8B needs 128 KiB a token."""

    def __post_init__(self) -> None:
        require_positive("generation", self, "samples", "batch_tokens")
        require(self.temperature >= 0, f"generation.temperature={self.temperature} must not be negative.")
        require(0 < self.top_p <= 1, f"generation.top_p={self.top_p} must be above 0 and at most 1.")
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
    run: str | None = setting(None, "nothing")
    """The folder of a run, the folder of an adapter, or `base` for the untouched model."""
    task: TaskConfig | None = section(None)
    grade: str | None = setting(None, "nothing")
    """Instead of run and task: the folder of an evaluation whose answers are to be graded again, without a model."""
    generation: GenerationConfig = section()
    model: ModelConfig | None = section(None)
    """null: the run's."""
    data: DataConfig | None = section(None)
    """Data set of task=perplexity, whose evaluation rows are taken. null: the run's."""
    grading_seconds: float = setting(5.0, "nothing")
    """Time limit for the verification of one answer; one that takes longer is wrong, and counted."""
    name: str | None = setting(None, "nothing")
    """The results lie in RUN/eval/name. null: the task's name."""
    output_dir: str = setting("outputs", "nothing")
    """Results of run=base lie in output_dir/base-MODEL."""
    trust_remote_code: bool = setting(False, "nothing")
    """Run Python code that comes with the model of a run or an adapter, whatever its config.yaml sets."""
    adapter_digest: str | None = setting(None, "answers")
    """Digest of the adapter's weights. cera-eval fills it in."""

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
