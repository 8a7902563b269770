"""Settings of an evaluation: what `cera-eval` does."""

from __future__ import annotations

from dataclasses import dataclass

from cera_train.common.settings import require, require_folder_name, require_positive, section, setting
from cera_train.settings.data import DataConfig
from cera_train.settings.distributed import ProcessesConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.tasks import TaskConfig


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
    batch_tokens: int = setting(32768, "cost")
    """Tokens of a batch if every answer were as long as it may be: bounds the memory of keys and values. A Llama of 8B
    takes 128 KiB a token."""

    def __post_init__(self) -> None:
        require_positive("generation", self, "samples", "batch_tokens")
        require(self.temperature >= 0, f"generation.temperature={self.temperature} must not be negative.")
        require(0 < self.top_p <= 1, f"generation.top_p={self.top_p} must be above 0 and at most 1.")
        if self.temperature == 0:
            require(
                self.samples == 1,
                f"generation.samples={self.samples} greedy answers would all be the same: choose generation=sample, or "
                "set generation.temperature.",
            )
            require(
                self.top_p == 1,
                f"generation.top_p={self.top_p} has no meaning for greedy answers: set generation.temperature too.",
            )


@dataclass
class EvalConfig:
    run: str | None = setting(None, "nothing")
    """A run's folder, an adapter's folder, or `base` for the untouched model."""
    task: TaskConfig | None = section(None)
    grade: str | None = setting(None, "nothing")
    """Instead of run and task: the folder of an evaluation. Its answers are graded again, without a model."""
    generation: GenerationConfig = section()
    model: ModelConfig | None = section(None)
    """null: the run's."""
    data: DataConfig | None = section(None)
    """The data set whose evaluation rows task=perplexity predicts. null: the run's."""
    launch: ProcessesConfig = section(ProcessesConfig)
    grading_seconds: float = setting(5.0, "nothing")
    """Time limit of math-verify for one answer. An answer that takes longer is wrong and counted."""
    name: str | None = setting(None, "nothing")
    """Results go to RUN/eval/name. null: the task's name."""
    output_dir: str = setting("outputs", "nothing")
    """Results of run=base go to output_dir/base-MODEL."""
    trust_remote_code: bool = setting(False, "nothing")
    """Runs Python code that comes with the model of a run or an adapter."""
    adapter_digest: str | None = setting(None, "answers")
    """Digest of the adapter's weights. cera-eval fills it in."""

    def __post_init__(self) -> None:
        require_positive("", self, "grading_seconds")
        if self.grade is not None:
            require(
                self.run is None and self.task is None,
                "grade=... takes neither run= nor task=: the folder records both.",
            )
            return
        is_base = self.run == "base"
        require(
            self.run is not None,
            "run=... is missing: the folder of a run, the folder of an adapter, or base (with model=...).",
        )
        require(self.task is not None, "task=... is missing: `cera-eval --help` lists the tasks.")
        require(self.model is not None or not is_base, "run=base needs model=..., such as model=smollm2_135m_pypi.")
        require_folder_name(self.folder_name)
        if self.task.kind == "perplexity":
            require(
                self.data is not None or not is_base,
                f"task={self.task.name} with run=base needs data=..., since there is no run whose rows to take.",
            )
        else:
            require(self.data is None, f"data=... belongs to task=perplexity; task={self.task.name} has task.files.")

    @property
    def folder_name(self) -> str:
        return self.name or self.task.name
