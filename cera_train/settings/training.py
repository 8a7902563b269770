"""Settings of the training loop, the optimizer and the tracker."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from cera_train.common.files import options
from cera_train.common.settings import (
    AUTO,
    require,
    require_address,
    require_positive,
    setting,
    word_of,
)
from cera_train.settings.evaluation import Grader


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
BatchLayout = StrEnum("BatchLayout", ["auto", "flat", "padded"])
Resume = StrEnum("Resume", ["auto", "never"])
ObjectiveKind = StrEnum("ObjectiveKind", ["sft", "dpo", "grpo"])
PreferenceLoss = StrEnum("PreferenceLoss", ["sigmoid", "ipo"])
Reference = StrEnum("Reference", ["start", "base"])


class Work(NamedTuple):
    """What an objective runs for its rows, without evaluations."""

    unit: str = "sequences"  # what train.batch_size counts
    passes: int = 1  # forward and backward, over the sequences of an update
    forward_passes: int = 0  # forward alone, over the sequences of an update
    reference_passes: int = 0  # forward alone, over all rows before the first update
    answers: int = 0  # sampled for each row, and trained on in place of the row
    answer_tokens: int = 0  # of an answer, at most


@dataclass
class OptimizerConfig:
    kind: OptimizerKind = setting(OptimizerKind.adamw, "result")
    lr: Any = setting(AUTO, "result")
    """Peak learning rate. auto: from the size and family of the model and the kind of adapter, see
    `training.optimizer.auto_rate`. The run's folder records the number."""
    weight_decay: float = setting(0.01, "result")
    """Decoupled, on all that is trained."""
    beta1: float = setting(0.9, "result")
    beta2: float = setting(0.999, "result")
    eps: float = setting(1e-8, "result")
    schedule: Schedule = setting(Schedule.linear, "result")
    """After the warm-up: constant; linear or cosine: down to 0 after the last update."""
    warmup_ratio: float = setting(0.03, "result")
    """Share of all updates over which the learning rate rises from 0 to its peak."""
    max_grad_norm: float = setting(1.0, "result")
    """Gradients are clipped to this 2-norm."""

    def __post_init__(self) -> None:
        if self.lr != AUTO:
            is_number = type(self.lr) in (int, float) and 0 < self.lr < math.inf
            require(is_number, f"optimizer.lr={self.lr} must be a positive number, or auto.")
        require_positive("optimizer", self, "eps", "max_grad_norm")
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay={self.weight_decay} must not be negative.",
        )
        for name in ("beta1", "beta2", "warmup_ratio"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and less than 1.")


@dataclass
class DpoConfig:
    """Direct preference optimisation, arXiv 2305.18290: `train.objective=dpo`."""

    beta: float = setting(0.1, "result")
    """How strongly the model is kept close to the reference."""
    loss: PreferenceLoss = setting(PreferenceLoss.sigmoid, "result")
    """sigmoid: DPO's; ipo: (margin a token - 1 / (2 beta))^2, arXiv 2310.12036."""
    label_smoothing: float = setting(0.0, "result")
    """The share of pairs assumed to be labelled the wrong way round; for loss=sigmoid."""
    sft_weight: float = setting(0.0, "result")
    """Weight of an added loss on the chosen answers, in nats per token."""
    reference: Reference = setting(Reference.start, "result")
    """The reference: the adapter at the start of the run (the base without adapter.start_from), or
    the base."""

    def __post_init__(self) -> None:
        require_positive("dpo", self, "beta")
        smoothing = self.label_smoothing
        weight = self.sft_weight
        require(
            0 <= smoothing < 0.5,
            f"dpo.label_smoothing={smoothing} must be at least 0 and less than 0.5.",
        )
        require(weight >= 0, f"dpo.sft_weight={weight} must not be negative.")

    @property
    def work(self) -> Work:
        return Work("pairs", forward_passes=1, reference_passes=1)


@dataclass
class GrpoConfig:
    """Group relative policy optimisation, arXiv 2402.03300: `train.objective=grpo`."""

    answers: int = setting(8, "result")
    """Answers sampled for each prompt: a group."""
    max_new_tokens: int = setting(256, "result")
    grader: Grader | None = setting(Grader.text, "result")
    """How an answer is compared with the row's, as in task=jsonl: text, number, math or choice. A
    right answer earns 1. null: only `rewards` count."""
    rewards: list[str] = setting(list, "result")
    """Functions by import path, such as my_rewards.brevity: f(prompt, answer, gold) -> number,
    added to the grade."""
    scale: bool = setting(True, "result")
    """Divide an advantage by the standard deviation of its group's rewards."""
    epochs: int = setting(1, "result")
    """Steps of the optimizer on the answers of an update. From the second on, ratios are
    clipped."""
    epsilon: float = setting(0.2, "result")
    """Clips the ratio of a token's probability to the one when it was sampled at 1 - epsilon, if
    that lowers the objective."""
    epsilon_high: float | None = setting(None, "result")
    """Clips it at 1 + epsilon_high. null: epsilon."""
    beta: float = setting(0.0, "result")
    """Weight of the KL divergence from the base, the model without its adapter."""
    max_sampler_distance: float | None = setting(None, "nothing")
    """With train.server: the largest distance of the server's log p from the model's, in nats a
    token, with which a run goes on. null: 4 times that of the base, measured before the first
    update."""

    def __post_init__(self) -> None:
        require_positive("grpo", self, "max_new_tokens", "epochs", "epsilon", "epsilon_high")
        require_positive("grpo", self, "max_sampler_distance")
        require(self.beta >= 0, f"grpo.beta={self.beta:g} must not be negative.")
        require(
            self.grader is not None or bool(self.rewards),
            "grpo.grader=null without grpo.rewards: name a function.",
        )
        require(
            self.answers > 1,
            f"grpo.answers={self.answers} must be at least 2: a group is compared with itself.",
        )

    @property
    def work(self) -> Work:
        reads_base = int(self.beta > 0)
        return Work(
            "prompts",
            self.epochs,
            reads_base,
            answers=self.answers,
            answer_tokens=self.max_new_tokens,
        )


@dataclass
class TrainConfig:
    objective: ObjectiveKind = setting(ObjectiveKind.sft, "result")
    """sft: learns the next token of the supervised text; dpo: the chosen answer over the rejected
    one; grpo: its own answers that are graded better than others to the same prompt."""
    batch_size: int = setting(16, "result")
    """Sequences per update; for dpo pairs, for grpo prompts."""
    micro_batch_tokens: int = setting(4096, "cost")
    """Tokens in one forward and backward pass, at most. Bounds memory; the loss does not depend on
    it, but dropout masks differ."""
    batch_layout: BatchLayout = setting(BatchLayout.auto, "cost")
    """flat: sequences end to end in one row, no padding; padded: sequences of near-equal length;
    auto: flat if the model allows it, except on a CPU where it would need a mask."""
    compile: bool | None = setting(None, "cost")
    """torch.compile of the model's layers: about a minute before the first update, and faster
    updates. Dropout draws other masks in compiled layers. null: on CUDA if torch finds a compiler,
    except for DoRA."""
    autocast: bool | None = setting(None, "result")
    """Compute in 16 bits over float32 weights. null: if the base is 16-bit, so that its adapter
    computes in 16 bits too."""
    epochs: int = setting(1, "result")
    """Passes over the training rows, each in an order of its own."""
    max_updates: int | None = setting(None, "result")
    """Stop after this many updates, however many epochs that takes. null: after `epochs`."""
    eval_every: int | None = setting(100, "result")
    """Updates between evaluations. null: only before the first update and after the last."""
    save_every: int | None = setting(100, "nothing")
    """Updates between checkpoints. null: only at the end and when interrupted."""
    keep: int = setting(2, "nothing")
    """The number of checkpoints kept, besides the best adapter."""
    patience: int | None = setting(3, "result")
    """Stop after this many evaluations without a lower perplexity. null, or with grpo: never."""
    check_coverage: bool = setting(True, "nothing")
    """Check on a few rows, before the first update, that every adapter runs and gets a gradient;
    refuse the run if one does not."""
    probe_tokens: int = setting(2048, "result")
    """Tokens of held-out rows from which the spectra are computed."""
    tasks: list[str] = setting(list, "result")
    """Tasks of cera-eval (files of conf/task) to answer and grade during training."""
    tasks_every: int | None = setting(None, "result")
    """Updates between evaluations of the tasks, a multiple of eval_every; the first comes before
    the first update. null: only after the last update."""
    tasks_limit: int = setting(50, "result")
    """Take only this many problems of each task, from the start."""
    task_settings: Any = setting(None, "result")
    """Settings of tasks that differ from their files, by name: {gsm8k: {files: [test.jsonl]}}."""
    samples: int = setting(0, "nothing")
    """The number of answers, to the first problems of each task, that every evaluation adds to
    samples.jsonl. Without tasks the prompts are those of the first held-out rows."""
    server: str | None = setting(None, "cost")
    """A vLLM server that generates answers during training, such as http://localhost:8000: to
    tasks, samples and, with grpo, prompts. It loads the current adapter under a name with its
    digest."""
    seed: int = setting(0, "result")
    """Draws the adapter's first weights, the order of the rows, dropout and sampled answers."""
    resume: Resume = setting(Resume.auto, "nothing")
    """auto: resume from the last undamaged checkpoint in the run's folder; never: start anew, but
    refuse to overwrite a finished run."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            "batch_size",
            "micro_batch_tokens",
            "epochs",
            "max_updates",
            "eval_every",
            "save_every",
            "keep",
            "patience",
            "probe_tokens",
            "tasks_every",
            "tasks_limit",
        )
        require_address("train.server", self.server)
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must be between 0 and 2**32 - 1.")
        require(self.samples >= 0, f"train.samples={self.samples} must not be negative.")
        for name in self.tasks:
            choices = ", ".join(options("task"))
            require(
                name in options("task"),
                f"train.tasks=[{name}]: there is no such task: choose from {choices}.",
            )
            require(self.tasks.count(name) == 1, f"train.tasks names {name} twice: keep one.")
        settings = self.task_settings or {}
        require(
            isinstance(settings, dict),
            f"train.task_settings={settings}: expected {{gsm8k: {{limit: 100}}}}.",
        )
        for name, changes in settings.items():
            place = f"train.task_settings.{name}={changes}"
            require(
                name in self.tasks,
                f"{place}: {name} is not in train.tasks: add it there, or leave this out.",
            )
            require(
                isinstance(changes, dict),
                f"{place}: expected names and values, such as {{max_new_tokens: 256}}.",
            )
        if (every := self.tasks_every) is not None:
            require(
                bool(self.tasks),
                f"train.tasks_every={every} without train.tasks: name a task, such as [gsm8k].",
            )
            require(
                self.eval_every is not None and every % self.eval_every == 0,
                f"train.tasks_every={every} must be a multiple of "
                f"train.eval_every={word_of(self.eval_every)}, since tasks are part of an "
                "evaluation: set one of the two.",
            )

    def changes_of_task(self, name: str) -> dict[str, Any]:
        """The settings of a task that differ from its file."""
        return {"limit": self.tasks_limit} | (self.task_settings or {}).get(name, {})


@dataclass
class HubConfig:
    push: str | None = setting(None, "nothing")
    """A repository on the Hugging Face Hub, such as me/my-adapter, for the final adapter and its
    card: uploaded after the run, or at once for a finished run. A new repository is private.
    null: no upload."""

    def __post_init__(self) -> None:
        is_name = self.push is None or re.fullmatch(r"([\w.-]+/)?[\w.-]{1,96}", self.push, re.ASCII)
        require(bool(is_name), f"hub.push={self.push}: expected a name such as me/my-adapter.")


@dataclass
class TrackerConfig:
    kinds: Any = setting(None, "nothing")
    """Trackers of Accelerate by name, each with arguments for its library's init, or null: {wandb:
    {entity: my-team}, mlflow: null}."""
    project: str = setting("cera-train", "nothing")
    """The project, or the experiment."""
    group: str | None = setting(None, "nothing")
    """The group of runs. null: the sweep's name; none for a run outside a sweep."""

    def __post_init__(self) -> None:
        self.kinds = self.kinds or {}
        require(
            isinstance(self.kinds, dict),
            f"tracker.kinds={self.kinds}: expected names, such as {{wandb: null}}.",
        )
        for name, arguments in self.kinds.items():
            require(
                arguments is None or isinstance(arguments, dict),
                f"tracker.kinds.{name}={arguments}: expected arguments by name, such as {{entity: "
                f"my-team}}, or null.",
            )
