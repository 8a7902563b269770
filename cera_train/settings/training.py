"""Settings of the training loop, the optimizer and the tracker."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cera_train.common.settings import AUTO, require, setting, word_of
from cera_train.settings.evaluation import Grader
from cera_train.settings.values import (
    Address,
    NamedSections,
    Rate,
    Repository,
    Settings,
    Share,
)


class Optimizer(NamedTuple):
    """A class that takes lr, betas, eps and weight_decay."""

    path: str
    """Where to import it from."""
    bits: int = 32
    """Bits of each moment."""
    needs_gpu: bool = False
    has_fused_cpu_step: bool = False
    """Whether it takes fused=True on a CPU."""


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim.AdamW", has_fused_cpu_step=True),
    "adamw_8bit": Optimizer("bitsandbytes.optim.AdamW8bit", bits=8),
    "paged_adamw_8bit": Optimizer("bitsandbytes.optim.PagedAdamW8bit", bits=8, needs_gpu=True),
}
"""Optimizers by `optimizer.kind`. To add one, write an entry here and a file in conf/optimizer."""

OptimizerKind = StrEnum("OptimizerKind", {kind: kind for kind in OPTIMIZERS}, module=__name__)


Schedule = StrEnum("Schedule", ["constant", "linear", "cosine"])
ObjectiveKind = StrEnum("ObjectiveKind", ["sft", "dpo", "grpo"])


class Work(NamedTuple):
    """What an objective runs for its rows, without evaluations."""

    unit: str = "sequences"  # what train.batch_size counts
    forward_passes: int = 0  # forward alone, over the sequences of an update
    reference_passes: int = 0  # forward alone, over all rows before the first update
    answers: int = 0  # sampled for each row, and trained on in place of the row
    answer_tokens: int = 0  # of an answer, at most


@dataclass
class OptimizerConfig(Settings):
    kind: OptimizerKind = setting(OptimizerKind.adamw, "result")
    lr: Rate = setting(AUTO, "result")
    """Peak learning rate. auto: from the size and family of the model and the kind of adapter, see
    `training.optimizer.auto_rate`. The run's folder records the number."""
    weight_decay: NonNegativeFloat = setting(0.01, "result")
    """Decoupled, on all that is trained."""
    beta1: Share = setting(0.9, "result")
    beta2: Share = setting(0.999, "result")
    eps: PositiveFloat = setting(1e-8, "result")
    schedule: Schedule = setting(Schedule.linear, "result")
    """After the warm-up: constant; linear or cosine: down to 0 after the last update."""
    warmup_ratio: Share = setting(0.03, "result")
    """Share of all updates over which the learning rate rises from 0 to its peak."""
    max_grad_norm: PositiveFloat = setting(1.0, "result")
    """Gradients are clipped to this 2-norm."""


@dataclass
class DpoConfig(Settings):
    """Direct preference optimisation, arXiv 2305.18290: `train.objective=dpo`."""

    beta: PositiveFloat = setting(0.1, "result")
    """How strongly the model is kept close to itself at the start of the run."""

    @property
    def work(self) -> Work:
        return Work("pairs", forward_passes=1, reference_passes=1)


@dataclass
class GrpoConfig(Settings):
    """Group relative policy optimisation, arXiv 2402.03300: `train.objective=grpo`."""

    answers: Annotated[int, Field(gt=1)] = setting(8, "result")
    """Answers sampled for each prompt: a group, whose answers are compared with each other."""
    max_new_tokens: PositiveInt = setting(256, "result")
    grader: Grader | None = setting(Grader.text, "result")
    """How an answer is compared with the row's, as in task=jsonl: text, number, math or choice. A
    right answer earns 1. null: only `rewards` count."""
    rewards: list[str] = setting(list, "result")
    """Functions by import path, such as my_rewards.brevity: f(prompt, answer, gold) -> number,
    added to the grade."""

    def __post_init__(self) -> None:
        require(
            self.grader is not None or bool(self.rewards),
            "grpo.grader=null without grpo.rewards: name a function.",
        )

    @property
    def work(self) -> Work:
        return Work("prompts", answers=self.answers, answer_tokens=self.max_new_tokens)


@dataclass
class TrainConfig(Settings):
    objective: ObjectiveKind = setting(ObjectiveKind.sft, "result")
    """sft: learns the next token of the supervised text; dpo: the chosen answer over the rejected
    one; grpo: its own answers that are graded better than others to the same prompt."""
    batch_size: PositiveInt = setting(16, "result")
    """Sequences per update; for dpo pairs, for grpo prompts."""
    micro_batch_tokens: PositiveInt = setting(4096, "cost")
    """Tokens in one forward and backward pass, at most. Bounds memory; the loss does not depend on
    it, but dropout masks differ."""
    compile: bool | None = setting(None, "cost")
    """torch.compile of the model's layers: about a minute before the first update, and faster
    updates. Dropout draws other masks in compiled layers. null: on CUDA if torch finds a compiler,
    except for DoRA."""
    autocast: bool | None = setting(None, "result")
    """Compute in 16 bits over float32 weights. null: if the base is 16-bit, so that its adapter
    computes in 16 bits too."""
    epochs: PositiveInt = setting(1, "result")
    """Passes over the training rows, each in an order of its own."""
    max_updates: PositiveInt | None = setting(None, "result")
    """Stop after this many updates, however many epochs that takes. null: after `epochs`."""
    eval_every: PositiveInt | None = setting(100, "result")
    """Updates between evaluations. null: only before the first update and after the last."""
    save_every: PositiveInt | None = setting(100, "nothing")
    """Updates between checkpoints. null: only at the end and when interrupted."""
    keep: PositiveInt = setting(2, "nothing")
    """The number of checkpoints kept, besides the best adapter."""
    patience: PositiveInt | None = setting(3, "result")
    """Stop after this many evaluations without a lower perplexity. null, or with grpo: never."""
    check_coverage: bool = setting(True, "nothing")
    """Check on a few rows, before the first update, that every adapter runs and gets a gradient;
    refuse the run if one does not."""
    tasks: list[str] = setting(list, "result")
    """Tasks of cera-eval (files of conf/task) to answer and grade during training."""
    tasks_every: PositiveInt | None = setting(None, "result")
    """Updates between evaluations of the tasks, a multiple of eval_every; the first comes before
    the first update. null: only after the last update."""
    tasks_limit: PositiveInt = setting(50, "result")
    """Take only this many problems of each task, from the start."""
    task_settings: NamedSections = setting(None, "result")
    """Settings of tasks that differ from their files, by name: {gsm8k: {files: [test.jsonl]}}."""
    samples: NonNegativeInt = setting(0, "nothing")
    """The number of answers, to the first problems of each task, that every evaluation adds to
    samples.jsonl; with grpo also the number of prompts of an update whose answers are added."""
    server: Address | None = setting(None, "cost")
    """A vLLM server that generates answers during training, such as http://localhost:8000: to
    tasks and, with grpo, prompts. It loads the current adapter under a name with its
    digest."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting(0, "result")
    """Draws the adapter's first weights, the order of the rows, dropout and sampled answers."""

    def __post_init__(self) -> None:
        for name in self.task_settings or {}:
            require(
                name in self.tasks,
                f"train.task_settings.{name}: {name} is not in train.tasks: add it there, or leave "
                "this out.",
            )
        if (every := self.tasks_every) is not None:
            require(
                self.eval_every is not None and every % self.eval_every == 0,
                f"train.tasks_every={every} must be a multiple of "
                f"train.eval_every={word_of(self.eval_every)}, since tasks are part of an "
                "evaluation: set one of the two.",
            )

    def changes_of_task(self, name: str) -> dict[str, Any]:
        """The settings of a task that differ from its file."""
        return {"limit": self.tasks_limit} | ((self.task_settings or {}).get(name) or {})


@dataclass
class HubConfig(Settings):
    push: Repository | None = setting(None, "nothing")
    """A repository on the Hugging Face Hub, such as me/my-adapter, for the final adapter and its
    card: uploaded after the run, or at once for a finished run. A new repository is private.
    null: no upload."""


@dataclass
class TrackerConfig(Settings):
    kinds: NamedSections = setting(None, "nothing")
    """Trackers of Accelerate by name, each with arguments for its library's init, or null: {wandb:
    {entity: my-team}, mlflow: null}."""
    project: str = setting("cera-train", "nothing")
    """The project, or the experiment."""

    def __post_init__(self) -> None:
        self.kinds = self.kinds or {}
