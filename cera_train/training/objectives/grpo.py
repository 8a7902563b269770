"""Group relative policy optimisation, arXiv 2402.03300: the model answers each prompt several
times, and learns from how an answer's reward differs from those of its group:

    loss = mean over the sampled tokens of -ratio A
    A = (reward - mean) / (deviation + 1e-4),    ratio = p / p when sampled

Every update samples anew from the current model: a ratio is 1, so clipping would never act, and its
gradient is that of log p. Random numbers follow from the seed and the update: an interrupted run
samples the same answers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from cera_train.adapters.saved import keeps_base
from cera_train.data.prepare import TokenizedRows, table_of
from cera_train.data.reader import Example, Question
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.requests import Answer, Request, check_positions
from cera_train.model.batches import MicroBatches
from cera_train.runs.folder import Progress, RunFolder
from cera_train.runs.results import SAMPLES, Sample, UpdateMetrics, figure
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config
from cera_train.training.build import Data, Model
from cera_train.training.objectives.objective import Objective, Update
from cera_train.training.objectives.policy import MOST_ROUNDING, PolicyCheck
from cera_train.training.rewards import Reward, grade_by, import_reward

MOST_WEIGHT = 2.0
"""Upper bound of a sampled token's importance weight, p here / p on the server: truncated, as in
TRL."""


# --- the loss -------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor) -> Tensor:
    """[prompts, answers] -> the same: how a reward differs from the mean of its group, in standard
    deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1)[:, None] + 1e-4)


def grpo_loss(log_p: Tensor, advantages: Tensor, sampled: Tensor | None = None) -> Tensor:
    """The loss, summed over sampled tokens. All arguments are [N].

    Args:
        advantages: the advantage of each token's answer.
        sampled: log p on the server that sampled the tokens, which are weighted by p here / p
            there.
    """
    ratios = (log_p - log_p.detach()).exp()
    gains = ratios * advantages
    if sampled is not None:
        gains = gains * (log_p.detach() - sampled).exp().clamp(max=MOST_WEIGHT)
    return -gains.sum()


# --- the objective --------------------------------------------------------------------------------


class Grpo(Objective):
    """
    Args:
        folder: its samples.jsonl keeps answers for inspection.
        progress: its update seeds the answers.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        model: Model,
        sampler: Sampler,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.config = config.grpo
        self.seed = config.train.seed
        self.samples = config.train.samples
        self.questions = data.questions
        self.model = model
        self.sampler = sampler
        self.folder = folder
        self.progress = progress
        self.rewards: list[Reward] = [import_reward(path) for path in self.config.rewards]
        if self.config.grader is not None:
            self.rewards.append(grade_by(self.config.grader))
        # A base that the adapter moves cannot be compared.
        limit = None if keeps_base(model.adapted) else MOST_ROUNDING
        self.policy = PolicyCheck(f"train.server={config.train.server}", model, limit)
        longest = max(len(question.prompt_ids) for question in self.questions)
        room = self.config.max_new_tokens
        check_positions("grpo.max_new_tokens", room, longest, sampler.engine.positions)

    def draw(self, numbers: list[int]) -> Update:
        questions = [self.questions[number] for number in numbers]
        groups = self._sample(questions, self.config.answers)
        batches = self._batches(questions, groups)
        distances = {}
        if self.sampler.is_served:
            distances = self._check_policy(questions, groups, batches)
        rewards = self._reward(questions, groups)
        self._keep_samples(questions, groups, rewards)
        return self._update(groups, batches, rewards, distances)

    def _batches(self, questions: list[Question], groups: list[list[Answer]]) -> MicroBatches:
        """One sequence for each answer, after its prompt."""
        examples = []
        for question, group in zip(questions, groups, strict=True):
            is_asked = [False] * len(question.prompt_ids)
            for answer in group:
                ids = [*question.prompt_ids, *answer.ids]
                examples.append(Example(ids, is_asked + [True] * len(answer.ids)))
        return self.model.micro_batches(TokenizedRows(table_of(examples)))

    def _check_policy(
        self, questions: list[Question], groups: list[list[Answer]], batches: MicroBatches
    ) -> dict[str, float]:
        """Returns figures of how far the server's policy is from the model's. Raises UserError
        where it is another."""
        if self.policy.limit is None:
            with self.sampler.engine.without_adapter():
                unadapted = self._sample(questions, 1)
            self.policy.measure(self._batches(questions, unadapted), sampled_log_p(unadapted))
        return self.policy.check(batches, sampled_log_p(groups))

    def _update(
        self,
        groups: list[list[Answer]],
        batches: MicroBatches,
        rewards: Tensor,
        distances: dict[str, float],
    ) -> Update:
        """The loss of sampled answers, with figures of them."""
        advantages = group_advantages(rewards).flatten()
        lengths = torch.tensor(batches.supervised)
        # An answer with zero advantage has no gradient.
        sequences = advantages.nonzero().flatten().tolist() or [0]
        figures = answer_figures(rewards, groups) | distances
        sampled = sampled_log_p(groups) if self.sampler.is_served else None
        # The processes average their gradients.
        weight = self.model.accelerator.num_processes / lengths.sum().to(batches.device)

        def loss(log_p: Tensor, group: Sequence[int]) -> Tensor:
            gains = advantages[group].repeat_interleave(lengths[group]).to(log_p.device)
            return weight * grpo_loss(log_p, gains, join_tokens(sampled, group, log_p.device))

        return Update(batches, sequences, loss, figures)

    def headline(self, metrics: UpdateMetrics) -> str:
        return f"reward {figure(metrics.reward)}"

    def _sample(self, questions: Sequence[Question], size: int) -> list[list[Answer]]:
        """`size` answers to each question, the same on every process."""
        requests = [
            Request(f"{self.progress.update}/{number}", sample, question.prompt_ids)
            for number, question in enumerate(questions)
            for sample in range(size)
        ]
        settings = GenerationConfig(temperature=1.0, seed=self.seed)
        answers = self.sampler.answer(requests, self.config.max_new_tokens, [], settings)
        return [answers[first : first + size] for first in range(0, len(answers), size)]

    def _reward(self, questions: list[Question], groups: list[list[Answer]]) -> Tensor:
        """[questions, answers] the sum of each answer's rewards, computed once for all processes: a
        judge may answer differently when asked again."""
        rewards = None
        if self.model.accelerator.is_main_process:
            rewards = [
                [self._sum_rewards(question, answer) for answer in group]
                for question, group in zip(questions, groups, strict=True)
            ]
        [rewards] = broadcast_object_list([rewards])
        return torch.tensor(rewards)

    def _sum_rewards(self, question: Question, answer: Answer) -> float:
        text = answer.generation.text
        return sum(reward(question.text, text, question.gold) for reward in self.rewards)

    def _keep_samples(
        self, questions: list[Question], groups: list[list[Answer]], rewards: Tensor
    ) -> None:
        """Adds the answers to the first `train.samples` questions of an update to samples.jsonl."""
        if not self.model.accelerator.is_main_process:
            return
        kept = zip(questions[: self.samples], groups, rewards.tolist(), strict=False)
        for question, group, earned in kept:
            for answer, reward in zip(group, earned, strict=True):
                sample = Sample(
                    self.progress.update + 1,
                    None,
                    question.prompt,
                    answer.generation.text,
                    question.gold,
                    reward=reward,
                    tokens=len(answer.ids),
                )
                self.folder.append(SAMPLES, sample.to_json())


def sampled_log_p(groups: list[list[Answer]]) -> list[list[float]]:
    """log p of each answer's tokens on the server that sampled them."""
    return [answer.sampled for group in groups for answer in group]


def join_tokens(
    values: list[list[float]] | None, group: Sequence[int], device: torch.device
) -> Tensor | None:
    """[N] values of the tokens of a micro-batch, from the values of each sequence, if any."""
    if values is None:
        return None
    return torch.tensor([value for number in group for value in values[number]], device=device)


def answer_figures(rewards: Tensor, groups: list[list[Answer]]) -> dict[str, float]:
    """Figures of an update's answers, by the names that TRL logs.

    Args:
        rewards: [prompts, answers].
    """
    deviations = rewards.std(1)
    answers = [answer for group in groups for answer in group]
    return {
        "train/reward": rewards.mean().item(),
        "train/reward_std": deviations.mean().item(),
        "train/frac_reward_zero_std": (deviations == 0).float().mean().item(),
        "train/completions/mean_length": fmean(len(answer.ids) for answer in answers),
        # An answer may end by its end token at the limit.
        "train/completions/clipped_ratio": fmean(answer.generation.truncated for answer in answers),
    }
