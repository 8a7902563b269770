"""Typed records of the files that a run leaves. Only this module spells their keys. Imports no
torch.

They include what a study compares, so that nothing has to run again: the loss of every held-out
token before the first update and after the last, and the grade of each answer to the run's
tasks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import BeforeValidator
from safetensors.numpy import load, save

from cera_train.common.errors import UserError, error_text
from cera_train.common.files import write_bytes, write_text
from cera_train.common.terminal import counted
from cera_train.runs.records import RESTORE, Record, key, read_lines, read_trees, to_lines

Perplexity = Annotated[
    float | None, BeforeValidator(lambda value: math.inf if value is None else value)
]
"""JSON has no infinity: null reads as infinite, and a missing key as None."""

# --- a run ----------------------------------------------------------------------------------------


class SpectrumSummary(Record):
    """Figures from the spectra of all adapted modules."""

    effective_rank_mean: float | None = key("spectrum/effective_rank/mean")
    effective_rank_max: float | None = key("spectrum/effective_rank/max")
    manifold_dimension_mean: float | None = key("spectrum/manifold_dimension/mean")
    # The share of a branch's variance that the best affine map of A x explains.
    linear_share_mean: float | None = key("spectrum/linear_share/mean")
    # The share of the gate in z + gamma (gate(z) - z), the mean over modules; None unless it is
    # learned.
    gamma: float | None = key("adapter/gamma")


class MeasuredAdapter(Record, extra="allow"):
    """A record that also holds an adapter's figures: spectra, and TASK/FIGURE such as
    gsm8k/exact."""

    __pydantic_extra__: dict[str, float | None]

    @property
    def spectrum(self) -> SpectrumSummary:
        return SpectrumSummary.from_json(self.details, "spectra")

    @property
    def tasks(self) -> dict[str, float]:
        """The figures of `train.tasks`."""
        return {
            name: value
            for name, value in self.details.items()
            if is_task_figure(name) and value is not None
        }


class RunResult(MeasuredAdapter):
    """result.json of a run, written last: a folder that has it is finished."""

    perplexity: Perplexity = key("eval/perplexity")  # after the last update
    perplexity_before: Perplexity = (
        None  # before the first update: usually that of the untouched base model
    )
    linear_share_before: float | None = None
    best_perplexity: Perplexity = None
    best_update: int | None = None
    adapter_kind: str | None = None
    adapter_r: int | None = None
    trainable_parameters: int | None = None
    trainable_share: float | None = None  # trainable parameters over all parameters
    updates: int | None = None
    epochs: float | None = None
    tokens: int | None = None  # tokens seen in updates, without padding
    tokens_per_s: float | None = None
    seconds: float | None = None  # time spent in updates
    peak_memory_bytes: float | None = None
    attention: str | None = None  # of updates
    compiled_graphs: int | None = None  # 0: eager layers
    fallbacks: list[str] | None = None  # what ran slower than it was meant to, and why
    folder: str | None = None
    adapter_digest: str | None = None  # of adapter/; earlier versions recorded none


def is_task_figure(name: str) -> bool:
    """Whether a key of result.json is a figure of a task."""
    return "/" in name and not name.startswith(("eval/", "spectrum/", "adapter/"))


DIVERGED = "diverged.txt"
"""File in the folder of a run whose loss became infinite: its error. Such a run has no
result.json."""


class Environment(Record, extra="allow"):
    """environment.json: the command, the versions and the machine of a run."""

    command: list[Any] | None = None
    python: str | None = None
    platform: str | None = None
    packages: dict[str, Any] | None = None
    gpus: list[str] | None = None  # names
    cpu_threads: int | None = None
    processes: int | None = None
    base_weights: str | None = None  # see `model.identity.BaseIdentity`
    base_config: dict[str, Any] | None = None
    rows: dict[str, str] | None = None  # digests of the training and the held-out tokens
    updates: int | None = None  # updates of the whole run

    @property
    def held_out(self) -> str | None:
        """A digest of the held-out rows and of what tokenises them: perplexities are comparable if
        it is equal."""
        return (self.rows or {}).get("held_out")

    @property
    def command_line(self) -> str | None:
        """The command as a user types it; None if it is not on record."""
        if not self.command:
            return None
        first, *others = map(str, self.command)
        program = Path(first).name
        start = ["python", "-m", "cera_train"] if program == "__main__.py" else [program]
        return shlex.join([*start, *others])

    @property
    def machine(self) -> str | None:
        """What the run was trained on; None if it is not on record."""
        if self.gpus is None:
            return None
        threads = "? threads" if self.cpu_threads is None else counted(self.cpu_threads, "thread")
        device = ", ".join(self.gpus) or f"CPU, {threads}"
        processes = self.processes or 1
        return f"{device}, {processes} {'process' if processes == 1 else 'processes'}"


def environment_of(run: Path) -> Environment:
    """environment.json of a run; empty without the file."""
    return Environment.find(run / "environment.json") or Environment()


SPECTRUM = "spectrum.json"


# --- metrics.jsonl --------------------------------------------------------------------------------

METRICS = "metrics.jsonl"
SPECTRA = "spectra.jsonl"
SAMPLES = "samples.jsonl"
LOGS = (METRICS, SPECTRA, SAMPLES)
"""Files that grow by lines, each with the number of its update."""


class UpdateMetrics(Record, extra="allow"):
    """The line of one update, with the figures of its objective."""

    update: int
    epoch: int | None = None
    loss: float | None = key("train/loss")  # in nats per supervised token
    perplexity: float | None = key("train/perplexity")
    grad_norm: float | None = key("train/grad_norm")
    lr: float | None = key("train/lr")
    tokens_per_s: float | None = key("train/tokens_per_s")
    seconds: float | None = key("train/seconds")  # time spent in updates so far
    # of the objectives that log them
    reward: float | None = key("train/reward")
    answer_length: float | None = key("train/completions/mean_length")
    margin: float | None = key("train/rewards/margins")


class EvaluationMetrics(MeasuredAdapter):
    """The line of one evaluation during training; also best/metrics.json."""

    update: int
    epoch: int | None = None
    loss: float | None = key("eval/loss")
    perplexity: Perplexity = key("eval/perplexity")


class Sample(Record):
    """An answer during training, a line of samples.jsonl."""

    update: int
    task: str | None = None  # None: an answer that train.objective=grpo learns from
    prompt: str
    answer: str  # as the model wrote it
    gold: str
    exact: bool | None = None
    reward: float | None = None  # only for such an answer
    tokens: int | None = None  # only for such an answer


@dataclass
class Metrics:
    """metrics.jsonl: the updates and the evaluations of a run, in order."""

    updates: list[UpdateMetrics] = field(default_factory=list)
    evaluations: list[EvaluationMetrics] = field(default_factory=list)

    @property
    def last_update(self) -> int:
        return max((line.update for line in (*self.updates, *self.evaluations)), default=0)

    def so_far(self) -> RunResult:
        """The latest figures of an unfinished run."""
        figures: dict[str, Any] = {}
        for line in self.evaluations:
            figures |= line.details | {"perplexity": line.perplexity}
        for line in self.updates[-1:]:
            figures |= {"tokens_per_s": line.tokens_per_s, "seconds": line.seconds}
        return RunResult(**figures)


def read_metrics(path: Path) -> Metrics:
    """The metrics of a run, which may still be running; empty if there are none."""
    metrics = Metrics()
    if not path.is_file():
        return metrics
    for place, tree in read_trees(path, may_break_off=True):
        if isinstance(tree, dict) and any(name.startswith("eval/") for name in tree):
            metrics.evaluations.append(EvaluationMetrics.from_json(tree, place))
        else:
            metrics.updates.append(UpdateMetrics.from_json(tree, place))
    return metrics


# --- losses and grades ----------------------------------------------------------------------------

LOSSES_BEFORE = "losses_before.safetensors"
LOSSES_AFTER = "losses_after.safetensors"
GRADES = "grades"  # folder with a file TASK.jsonl for each task


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The loss of every supervised held-out token."""

    tokens: np.ndarray  # [rows] supervised tokens of each row, int64
    losses: np.ndarray  # [sum(tokens)] nats, float32, row by row

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return float(self.losses.mean(dtype="float64"))

    def sums(self) -> np.ndarray:
        """[rows] nats of each row, float64."""
        rows = np.repeat(np.arange(len(self.tokens)), self.tokens)
        return np.bincount(rows, weights=self.losses, minlength=len(self.tokens))

    def write(self, path: Path) -> None:
        write_bytes(path, save({"tokens": self.tokens, "losses": self.losses}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The losses in a file; raises UserError if it is missing or broken."""
        try:
            return cls(**load(path.read_bytes()))
        except Exception as error:  # safetensors raises many types on a file that is not its own
            raise UserError(f"{path} is broken: {error_text(error)}. {RESTORE}") from error


class GradedProblem(Record):
    """The answer to one problem after the last update."""

    fix: ClassVar[str] = "Restore it, or train with this task in train.tasks."

    problem: str  # its id
    score: float  # 0 to 1
    ending: str


def write_grades(run: Path, task: str, problems: Sequence[GradedProblem]) -> None:
    path = run / GRADES / f"{task}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_text(path, to_lines(problems))


def read_grades(run: Path, task: str) -> list[GradedProblem]:
    """The grades of one of `train.tasks`, in the task's order."""
    return read_lines(run / GRADES / f"{task}.jsonl", GradedProblem)


# --- figures in a line ----------------------------------------------------------------------------

SPECTRUM_TERMS = (
    "Effective rank: how many directions a branch's output has, at most r. Manifold dimension: "
    "how many hold 90 % of its variance. Linear share: how much of its variance an affine map of "
    "A x explains; cera-export measures what is lost without the rest."
)
"""Words for captions."""


def describe_rank(spectrum: SpectrumSummary) -> str:
    if spectrum.effective_rank_mean is None:
        return ""
    return (
        f"{figure(spectrum.effective_rank_mean, 1)} mean, "
        f"{figure(spectrum.effective_rank_max, 1)} max"
    )


def describe_linear_share(result: RunResult) -> str:
    """How linear the gates of a run are; empty without gates."""
    share = result.spectrum.linear_share_mean
    before = result.linear_share_before
    if share in (None, 1.0):
        return ""
    at_start = "" if before is None else f", {before:.1%} at the start"
    return (
        f"{share:.1%} of the branch is linear in A x{at_start}; near 100% the gate is hardly used"
    )


def describe_tasks(figures: dict[str, float], before: dict[str, float] | None = None) -> str:
    """Figures of tasks in a line: gsm8k exact 12.0%, verified 14.0%. With `before`: gsm8k exact
    2.0% before, 12.0% after."""
    tasks: dict[str, list[str]] = {}
    for full_name, value in figures.items():
        task, _, name = full_name.partition("/")
        share = f"{value:.1%}"
        if before and full_name in before:
            share = f"{before[full_name]:.1%} before, {share} after"
        tasks.setdefault(task, []).append(f"{name} {share}")
    return "; ".join(f"{task} {', '.join(texts)}" for task, texts in tasks.items())


def figure(value: float | None, decimals: int = 3) -> str:
    """A number with this many decimals, or in powers of ten if that is too long."""
    if value is None:
        return "–"
    return f"{value:,.{decimals}f}" if abs(value) < 1e9 else f"{value:.3g}"
