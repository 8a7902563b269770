"""What the answers to `train.tasks` and `train.samples` cost while a run trains.

Decoding waits for the calls of its layers and for the weights to be read, not for its arithmetic: its time is that of
its steps, one for each token of the longest answer of a batch. Every answer is counted as long as it may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean

from cera_train.common.errors import UserError, errors_at
from cera_train.evaluation.tasks.task import load_problems, named_task
from cera_train.planning.data_size import CHARACTERS_PER_TOKEN, DataSize, facts_at
from cera_train.planning.devices import Device
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config
from cera_train.settings.training import SAMPLE_ROOM

LAYER_SECONDS = 4e-4
"""Time in which a layer is called for one token: SmolLM2's on a CPU; on a GPU, where kernels wait to be launched, an
assumption."""

DECODING_SHARE = 0.5
"""Speed of a decoding step's products, over that of training: SmolLM2's on a CPU with 64 answers at once."""


@dataclass(frozen=True)
class AnswerSize:
    """Answers that are generated at one evaluation."""

    name: str
    """The task's."""
    answers: int
    problems: int
    """Those that count in the scores."""
    prompt_tokens: float
    new_tokens: int
    """The most that an answer may have."""
    source: str
    """Where the numbers come from, for people."""

    def seconds(self, processes: int, step_seconds: float, token_seconds: float) -> float:
        """Time of all answers.

        Args:
            step_seconds: of a step, before any product.
            token_seconds: of a token's products, at the speed of training.
        """
        count = math.ceil(self.answers / processes)
        at_once = max(1, int(GenerationConfig.batch_tokens / (self.prompt_tokens + self.new_tokens)))
        steps = math.ceil(count / at_once) * self.new_tokens
        return steps * step_seconds + count * token_seconds * (self.prompt_tokens + self.new_tokens / DECODING_SHARE)


def step_seconds(device: Device, layers: int, weight_bytes: float) -> float:
    """Time of a decoding step, before any product."""
    return LAYER_SECONDS * layers + weight_bytes / device.bandwidth


def sizes_of_tasks(config: Config, data: DataSize) -> list[AnswerSize]:
    """The answers of an evaluation by tasks."""
    return [size_of_task(name, config, data) for name in config.train.tasks]


def size_of_task(name: str, config: Config, data: DataSize) -> AnswerSize:
    """Reads the problems of local files, or computes them. Of a task of the Hub it takes the facts of its rows; where
    there are none, its prompts are taken to be as long as those that the run trains on.

    Raises:
        UserError: the number of problems is neither known nor limited.
    """
    settings, place = named_task(name, config.train.changes_of_task(name)), f"train.tasks=[{name}]"
    if settings.files or settings.path is None:
        with errors_at(place):
            problems = load_problems(settings, config.data)
        tokens = fmean(len(problem.prompt) for problem in problems) / CHARACTERS_PER_TOKEN
        return AnswerSize(name, len(problems), len(problems), tokens, settings.max_new_tokens, "by their characters")
    facts = facts_at(settings.path)
    known = [count for count in (settings.limit, facts and facts.eval_rows) if count is not None]
    if not known:
        raise UserError(
            f"{place}: the number of its problems is unknown: set train.task_settings.{name}.limit, or task files."
        )
    tokens, source = data.tokens_per_row * (1 - data.supervised), "a guess by the training rows"
    if facts is not None:
        tokens, source = facts.tokens_per_row * (1 - facts.supervised), "an estimate" if facts.estimated else "by facts"
    return AnswerSize(name, min(known), min(known), tokens, settings.max_new_tokens, source)


def sizes_of_samples(config: Config, data: DataSize, tasks: Iterable[AnswerSize]) -> list[AnswerSize]:
    """The samples of every evaluation: of the first problems of each task; without tasks, of evaluation rows."""
    count = config.train.samples
    if not count:
        return []
    of_tasks = [replace(size, answers=min(count, size.answers), problems=0) for size in tasks]
    new_tokens = max(SAMPLE_ROOM, round(data.tokens_per_row * data.supervised))
    of_rows = AnswerSize("samples", count, 0, data.tokens_per_row * (1 - data.supervised), new_tokens, data.source)
    return of_tasks or [of_rows]
