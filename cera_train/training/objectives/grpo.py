"""Group relative policy optimisation, arXiv 2402.03300: the model answers each prompt several times, and learns from
how an answer's reward differs from those of its group:

    loss = - sum of A log p over the sampled tokens / their number,    A = (reward - mean) / (deviation + 1e-4)

An update trains on answers of the model as it is, so ratios to an older policy are 1, and nothing is clipped. Random
numbers follow from the seed and the update: a run that was cut samples the same answers again.
"""

from __future__ import annotations

import math
import operator
import pydoc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import require
from cera_train.data.prepare import Example, TokenizedRows, table_of
from cera_train.evaluation.generate import Request, cut_batches, generate_ids, prepare_generation
from cera_train.evaluation.tasks.jsonl import EXTRACT, IS_EXACT, gold
from cera_train.model.batches import MicroBatches
from cera_train.runs.outcomes import TokenLosses
from cera_train.settings.evaluation import GenerationConfig, Grader
from cera_train.training.objectives import Drawn, weighted

if TYPE_CHECKING:
    from cera_train.training.session import Session

Reward = Callable[[str, str, str], float]
"""Takes a prompt, an answer to it, and the row's answer."""

PATIENCE = 100
"""Groups that all lack a difference in reward, after which a run is given up."""


class Grpo:
    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config.grpo
        self.rewards: list[Reward] = [*map(named, self.config.rewards)]
        if self.config.grader is not None:
            self.rewards.append(partial(grade, grader=self.config.grader))
        self._groups_without_signal: float = 0

    def begin(self, rows: list[int]) -> Drawn:
        session, config = self.session, self.config
        prompts = [self._prompt(row) for row in rows]
        answers = self._sample([ids for ids, _ in prompts])
        groups = list(zip(prompts, answers, strict=True))
        rewards = torch.tensor([[self._reward(*prompt, answer) for answer in group] for prompt, group in groups])
        self._check_signal(rewards)
        deviations, advantages = rewards.std(1), rewards - rewards.mean(1, keepdim=True)
        if config.scale:
            advantages /= deviations[:, None] + 1e-4
        examples = [
            Example([*ids, *answer], [False] * len(ids) + [True] * len(answer))
            for (ids, _), group in groups
            for answer in group
        ]
        sampled = TokenizedRows(table_of(examples))
        self._tokens, lengths = sampled.supervised, torch.tensor(sampled.supervised, dtype=torch.float32)
        self._weights = (advantages.flatten() / lengths.sum()).tolist()
        figures = {
            "reward": rewards.mean(),
            "reward_std": deviations.mean(),
            "frac_reward_zero_std": (deviations == 0).float().mean(),
            "completions/mean_length": lengths.mean(),
            "completions/clipped_ratio": (lengths == config.max_new_tokens).float().mean(),
        }
        tokens = session.config.train.micro_batch_tokens
        batches = MicroBatches(sampled, session.local_loss.is_flat, tokens, session.accelerator.device)
        moving = [number for number, weight in enumerate(self._weights) if weight]
        return Drawn(batches, moving or [0], {f"train/{name}": value.item() for name, value in figures.items()})

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        weights = [self._weights[number] for number in group]
        tokens = [self._tokens[number] for number in group]
        value = -sum(map(operator.mul, weights, tokens))
        return self.session.accelerator.num_processes * weighted(losses, tokens, weights, value)

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        return losses, {}

    def _prompt(self, row: int) -> tuple[tuple[int, ...], str]:
        """The tokens before a row's answer, and the answer."""
        rows = self.session.data.train
        ids, supervised = rows.tokens("input_ids", row).to_pylist(), rows.tokens("loss_mask", row).to_pylist()
        start = supervised.index(True)
        return tuple(ids[:start]), self.session.tokenizer.decode(ids[start:], skip_special_tokens=True)

    def _sample(self, prompts: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
        """The tokens of a group of answers to each prompt, the same on every process."""
        session, config = self.session, self.config
        update, accelerator = session.progress.update, session.accelerator
        requests = [
            Request(f"{update}/{number}", sample, prompt)
            for number, prompt in enumerate(prompts)
            for sample in range(config.answers)
        ]
        settings = GenerationConfig(temperature=1.0, seed=session.config.train.seed)
        with session.local_loss.generating() as base:
            prepare_generation(base, session.tokenizer, config.max_new_tokens, [])
            batches = cut_batches(requests, config.max_new_tokens, settings.batch_tokens)
            answers = {
                (request.problem, request.sample): ids
                for batch in batches[accelerator.process_index :: accelerator.num_processes]
                for request, ids in zip(
                    batch, generate_ids(session.model, base, session.tokenizer, batch, settings), strict=True
                )
            }
        everywhere = {place: ids for process in gather_object([answers]) for place, ids in process.items()}
        return [
            [everywhere[f"{update}/{number}", sample] for sample in range(config.answers)]
            for number in range(len(prompts))
        ]

    def _reward(self, prompt: Sequence[int], right: str, answer: Sequence[int]) -> float:
        """The sum of the rewards of an answer."""
        asked, said = self.session.tokenizer.batch_decode([prompt, answer], skip_special_tokens=True)
        return sum(reward(asked, said, right) for reward in self.rewards)

    def _check_signal(self, rewards: Tensor) -> None:
        """Raises UserError where no group of the first hundred had answers of different rewards."""
        if (rewards != rewards[:, :1]).any():
            self._groups_without_signal = -math.inf
        self._groups_without_signal += len(rewards)
        require(
            self._groups_without_signal < PATIENCE,
            f"train.objective=grpo: in {PATIENCE} groups all answers earned as much, {rewards.mean():g} at last, and "
            "nothing can be learnt: train on these rows first, raise grpo.answers, or choose another grpo.grader.",
        )


def grade(prompt: str, answer: str, right: str, grader: Grader) -> float:
    """1 for an answer that is the row's, by one of the graders of task=jsonl."""
    with errors_at(f"grpo.grader={grader}"):
        expected = gold({"answer": right}, "answer", grader)
    found = EXTRACT[grader](answer)
    return float(found is not None and IS_EXACT.get(grader, operator.eq)(found, expected))


def named(path: str) -> Reward:
    """The reward of an import path. An error or a value that is no number raises UserError."""
    place = f"grpo.rewards=[{path}]"
    try:
        function = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{place} cannot be imported: {error.exc.__name__}: {error.value}.") from error
    require(callable(function), f"{place}: there is no such function: write module.function, and mind PYTHONPATH.")

    def reward(prompt: str, answer: str, right: str) -> float:
        try:
            value = float(function(prompt, answer, right))
        except Exception as error:  # it is the user's
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{place} fails for the answer {answer[:60]!r}: {reason}.") from error
        require(math.isfinite(value), f"{place} gives {value} for the answer {answer[:60]!r}: return a finite number.")
        return value

    return reward
