"""Group relative policy optimisation, arXiv 2402.03300: the model answers each prompt several
times, and learns from how an answer's reward differs from those of its group:

    loss = - sum of min(ratio A, clip(ratio) A) - beta ratio KL over the sampled tokens / their
    number A = (reward - mean) / (deviation + 1e-4),    ratio = p / p when sampled,    KL = e^x - x
    - 1 with x = log p_base / p

An update trains on answers of the model as it is: a ratio is 1 in the first of its `grpo.epochs`
passes. Random numbers follow from the seed and the update: a run that was cut samples the same
answers again.
"""

from __future__ import annotations

import math
import operator
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from cera_train.adapters.saved import keeps_base
from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import require
from cera_train.data.computed import Draw, Split, draws
from cera_train.data.prepare import Example, TokenizedRows, table_of
from cera_train.data.rows import computed_row
from cera_train.evaluation.held_out import token_losses
from cera_train.evaluation.requests import Answer, Request, check_positions
from cera_train.evaluation.tasks import reasoning_gym
from cera_train.evaluation.tasks.jsonl import EXTRACT, IS_EXACT, gold
from cera_train.model.batches import MicroBatches
from cera_train.runs.results import SAMPLES, Sample, figure
from cera_train.settings.data import DataConfig, Layout
from cera_train.settings.evaluation import GenerationConfig, Grader
from cera_train.training.objectives import Drawn, Sft

if TYPE_CHECKING:
    from cera_train.training.session import Session

Reward = Callable[[str, str, str], float]  # takes a prompt, an answer to it, and the row's answer

MOST_WEIGHT = 2.0
"""Upper bound of a sampled token's importance weight, p here / p on the server: truncated, as in
TRL."""

PATIENCE = 100  # groups that all lack a difference in reward, after which a run is given up


class Prompt(NamedTuple):
    """What a row asks."""

    ids: tuple[int, ...]  # the tokens before the row's answer
    text: str
    right: str  # the row's answer


class Grpo(Sft):
    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config.grpo
        self.rewards: list[Reward] = [*map(named, self.config.rewards)]
        if self.config.grader is not None:
            self.rewards.append(
                partial(
                    grade, grader=self.config.grader, drawn=drawn_questions(session.config.data)
                )
            )
        require(
            not self.config.beta or keeps_base(session.model),
            f"grpo.beta={self.config.beta:g} needs the base as the reference, and adapter.kind="
            f"{session.config.adapter.kind} trains it: set grpo.beta=0.",
        )
        rows = session.data.train
        longest = max(rows.tokens("loss_mask", row).index(True).as_py() for row in range(len(rows)))
        check_positions(
            "grpo.max_new_tokens",
            self.config.max_new_tokens,
            longest,
            session.sampler.engine.positions,
        )

    def begin(self, rows: list[int]) -> Drawn:
        session = self.session
        config = self.config
        prompts = [self._prompt(row) for row in rows]
        groups = self._sample([prompt.ids for prompt in prompts])
        rewards = self._rewards(prompts, groups)
        self._check_signal(rewards)
        self._log(prompts, groups, rewards)
        deviations = rewards.std(1)
        advantages = rewards - rewards.mean(1, keepdim=True)
        if config.scale:
            advantages /= deviations[:, None] + 1e-4
        examples = [
            Example(
                [*prompt.ids, *answer.ids], [False] * len(prompt.ids) + [True] * len(answer.ids)
            )
            for prompt, group in zip(prompts, groups, strict=True)
            for answer in group
        ]
        sampled = TokenizedRows(table_of(examples))
        tokens = session.config.train.micro_batch_tokens
        batches = MicroBatches(
            sampled, session.local_loss.is_flat, tokens, session.accelerator.device
        )
        self._advantages = advantages.flatten()
        self._lengths = torch.tensor(sampled.supervised)
        self._before: dict[tuple[int, ...], Tensor] = {}
        reward = rewards.mean().item()
        lengths = self._lengths.float()
        drawn = Drawn(
            batches,
            self._advantages.nonzero().flatten().tolist() or [0],
            {
                "train/reward": reward,
                "train/reward_std": deviations.mean().item(),
                "train/frac_reward_zero_std": (deviations == 0).float().mean().item(),
                "train/completions/mean_length": lengths.mean().item(),
                "train/completions/clipped_ratio": (lengths == config.max_new_tokens)
                .float()
                .mean()
                .item(),
            },
            passes=config.epochs,
            headline=f"reward {figure(reward)}",
        )
        self._sampled = [answer.log_p for group in groups for answer in group]
        if session.sampler.is_served:
            self._mismatch = drawn.sums["train/sampling/log_p_difference"] = torch.zeros(
                (), device=batches.device
            )
        if config.beta:
            drawn.rows = [*range(len(examples))]
            with session.model.disable_adapter():
                losses = token_losses(session.local_loss, batches, drawn.rows, session.accelerator)
            self._reference = torch.from_numpy(losses.losses).split(sampled.supervised)
            self._kl = drawn.sums["train/kl"] = torch.zeros((), device=batches.device)
        self._tokens_run = int(self._lengths[drawn.rows].sum())
        return drawn

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        config = self.config
        device = losses.device
        advantages = self._advantages[group].repeat_interleave(self._lengths[group]).to(device)
        before = self._before.setdefault(tuple(group), losses.detach())  # of the first pass
        ratios = (before - losses).exp()
        clipped = ratios.clamp(1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
        gains = torch.minimum(ratios * advantages, clipped * advantages)
        processes = self.session.accelerator.num_processes
        share = processes / self._lengths.sum().to(device)
        if self.session.sampler.is_served:
            sampled = torch.cat([torch.tensor(self._sampled[number]) for number in group]).to(
                device
            )
            difference = -before - sampled
            self._mismatch += (
                processes * difference.abs().sum() / (self._tokens_run * config.epochs)
            )
            gains = gains * difference.exp().clamp(max=MOST_WEIGHT)
        total = -gains.sum()
        if config.beta:
            excess = losses - torch.cat([self._reference[number] for number in group]).to(device)
            divergence = (ratios * (excess.exp() - excess - 1)).sum()
            self._kl += share * divergence.detach() / config.epochs
            total = total + config.beta * divergence
        return share * total

    def _prompt(self, row: int) -> Prompt:
        rows = self.session.data.train
        tokenizer = self.session.tokenizer
        ids = rows.tokens("input_ids", row).to_pylist()
        supervised = rows.tokens("loss_mask", row).to_pylist()
        start = supervised.index(True)
        end = [*supervised, False].index(False, start)  # of a chat's first answer
        text, right = (
            tokenizer.decode(part, skip_special_tokens=True)
            for part in (ids[:start], ids[start:end])
        )
        return Prompt(tuple(ids[:start]), text, right)

    def _sample(self, prompts: Sequence[tuple[int, ...]]) -> list[list[Answer]]:
        """A group of answers to each prompt, the same on every process."""
        session = self.session
        config = self.config
        requests = [
            Request(f"{session.progress.update}/{number}", sample, prompt)
            for number, prompt in enumerate(prompts)
            for sample in range(config.answers)
        ]
        settings = GenerationConfig(temperature=1.0, seed=session.config.train.seed)
        answers = session.sampler.answer(requests, config.max_new_tokens, [], settings)
        return [
            answers[first : first + config.answers]
            for first in range(0, len(answers), config.answers)
        ]

    def _rewards(self, prompts: list[Prompt], groups: list[list[Answer]]) -> Tensor:
        """[prompts, answers]: the sums of an answer's rewards, taken once for all processes: a
        judge may say otherwise when asked again."""
        rewards = None
        if self.session.accelerator.is_main_process:
            rewards = [
                [
                    sum(
                        reward(prompt.text, each.generation.text, prompt.right)
                        for reward in self.rewards
                    )
                    for each in group
                ]
                for prompt, group in zip(prompts, groups, strict=True)
            ]
        [rewards] = broadcast_object_list([rewards])
        return torch.tensor(rewards)

    def _log(self, prompts: list[Prompt], groups: list[list[Answer]], rewards: Tensor) -> None:
        """Adds the answers to the first `train.samples` prompts of an update to samples.jsonl."""
        session = self.session
        update = self.session.progress.update + 1
        count = session.config.train.samples if session.accelerator.is_main_process else 0
        for prompt, group, earned in zip(prompts[:count], groups, rewards.tolist(), strict=False):
            for answer, reward in zip(group, earned, strict=True):
                text = answer.generation.text
                tokens = len(answer.ids)
                sample = Sample(
                    update, None, prompt.text, text, prompt.right, reward=reward, tokens=tokens
                )
                session.folder.append(SAMPLES, sample.to_json())

    def _check_signal(self, rewards: Tensor) -> None:
        """Raises UserError where no group of the first hundred had answers of different rewards."""
        progress = self.session.progress
        progress.rewards_differed |= bool((rewards != rewards[:, :1]).any())
        require(
            progress.rewards_differed or (progress.update + 1) * len(rewards) < PATIENCE,
            f"train.objective=grpo: in {PATIENCE} groups all answers earned as much, "
            f"{rewards.mean():g} at last, and "
            "nothing can be learnt: train on these rows first, raise grpo.answers, or choose "
            "another grpo.grader.",
        )


def drawn_questions(data: DataConfig) -> dict[str, Draw]:
    """The training questions of reasoning-gym by their prompts."""
    return {
        computed_row(draw.question, draw.answer)["prompt"].strip(): draw
        for _, part in data.parts()
        if part.layout == Layout.reasoning_gym
        for draw in draws(part.reasoning_gym, Split.train, part.train_rows, "data.train_rows")
    }


def grade(prompt: str, answer: str, right: str, grader: Grader, drawn: Mapping[str, Draw]) -> float:
    """1 for a right answer: by the generator that drew the question, else by one of the graders of
    task=jsonl."""
    if grader == Grader.text and prompt.strip() in drawn:
        return float(reasoning_gym.grade(answer, drawn[prompt.strip()]).is_right)
    with errors_at(f"grpo.grader={grader}"):
        expected = gold({"answer": right}, "answer", grader)
    found = EXTRACT[grader](answer)
    return float(found is not None and IS_EXACT.get(grader, operator.eq)(found, expected))


def named(path: str) -> Reward:
    """The reward of an import path. An error or a value that is no number raises UserError."""
    place = f"grpo.rewards=[{path}]"
    try:
        function = pkgutil.resolve_name(path)
    except Exception as error:  # of the user's module, or of its name
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{place} cannot be imported: {reason}. Write module.function, and mind PYTHONPATH."
        ) from error

    def reward(prompt: str, answer: str, right: str) -> float:
        try:
            value = float(function(prompt, answer, right))
        except Exception as error:  # it is the user's
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{place} fails for the answer {answer[:60]!r}: {reason}.") from error
        require(
            math.isfinite(value),
            f"{place} gives {value} for the answer {answer[:60]!r}: return a finite number.",
        )
        return value

    return reward
