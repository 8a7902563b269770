"""Direct preference optimisation, arXiv 2305.18290, on pairs of a chosen and a rejected answer:

    loss = -log sigmoid(beta margin),    margin = log p / p_ref (chosen) - log p / p_ref (rejected)

The two answers of a pair may lie in different micro-batches and processes. So a pass without
gradients first computes log p of every answer of an update; the derivative of the loss with respect
to it weights that answer's gradient in the passes that follow. On the held-out pairs, exp of the
loss is the perplexity of the choice: 2 for a coin flip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from accelerate.utils import broadcast_object_list
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cera_train.adapters.saved import keeps_base
from cera_train.common.files import cache_dir, cached_folder, read_parsed, write_bytes
from cera_train.common.settings import require, to_plain
from cera_train.common.terminal import announce
from cera_train.data.prepare import digest_of_parts
from cera_train.evaluation.held_out import token_losses
from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses
from cera_train.settings.run import Config
from cera_train.settings.training import DpoConfig, PreferenceLoss, Reference
from cera_train.training.build import Data, Model
from cera_train.training.objectives.objective import Drawn

REFERENCE = "reference.safetensors"
"""File with log p of every answer under the reference: in the cache, and in the run's folder, so
that the run resumes without the cache."""


# --- the loss -------------------------------------------------------------------------------------


def preference_losses(gains: Tensor, tokens: Tensor, config: DpoConfig) -> Tensor:
    """The loss of each pair, without the term of supervised fine-tuning.

    Args:
        gains: [pairs, 2] log p - log p_ref of the chosen and the rejected answer.
        tokens: [pairs, 2] their lengths.
    """
    if config.loss == PreferenceLoss.ipo:
        chosen, rejected = (gains / tokens).T
        return (chosen - rejected - 1 / (2 * config.beta)) ** 2
    margins = config.beta * (gains[:, 0] - gains[:, 1])
    smoothing = config.label_smoothing
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)


def dpo_loss(log_p: Tensor, reference: Tensor, tokens: Tensor, config: DpoConfig) -> Tensor:
    """The mean loss of pairs, with the term of supervised fine-tuning: a scalar.

    Args:
        log_p: [pairs, 2] of the chosen and the rejected answers.
        reference: [pairs, 2] the same under the reference.
        tokens: [pairs, 2] their lengths.
    """
    loss = preference_losses(log_p - reference, tokens, config).mean()
    return loss - config.sft_weight * log_p[:, 0].sum() / tokens[:, 0].sum()


def preference_figures(gains: Tensor, beta: float, prefix: str) -> dict[str, float]:
    """The metrics of pairs by their usual names."""
    chosen, rejected = (beta * gains.detach()).T
    rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
    return {f"{prefix}/rewards/{name}": float(values.mean()) for name, values in rewards.items()}


def accuracy(gains: Tensor) -> float:
    """The share of pairs in which the chosen answer gained more."""
    return (gains[:, 0] > gains[:, 1]).float().mean().item()


def answer_log_p(losses: TokenLosses) -> Tensor:
    """[pairs, 2] log p of the chosen and the rejected answers, float64."""
    return -torch.from_numpy(losses.sums()).view(-1, 2)


# --- the objective --------------------------------------------------------------------------------


def turn_dropout_off(model: nn.Module) -> None:
    """Of base and adapter, as TRL does: an answer's weight follows from its log p without dropout,
    and so must its gradient."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@dataclass
class Pairs(Drawn):
    """Pairs of answers: sequences 2 i and 2 i + 1 form a pair."""

    answer_weights: dict[int, float] = field(default_factory=dict)
    """The derivative of the loss with respect to log p of each answer."""
    share: float = 0.0
    """Each answer's part of the loss."""


class Dpo:
    """
    Args:
        held_out: micro-batches of the held-out pairs.
        run: the run's folder.
        resumes: the run goes on from a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        model: Model,
        held_out: MicroBatches,
        run: Path,
        resumes: bool,
    ) -> None:
        self.config = config.dpo
        self.language_model = model.language_model
        self.accelerator = model.accelerator
        self.batches = model.micro_batches(data.rows.train)
        turn_dropout_off(model.adapted)
        # The base with the adapter off, a reference shared with runs of other adapters; or the
        # adapter at the start of the run.
        starts_at_base = config.adapter.start_from is None
        wants_base = starts_at_base or self.config.reference == Reference.base
        is_base = wants_base and keeps_base(model.adapted)
        require(
            is_base or starts_at_base or not wants_base,
            "dpo.reference=base: this adapter changes weights of the base, such as its biases, so "
            "the base is gone: set dpo.reference=start.",
        )
        splits = {"train": self.batches, "held_out": held_out}
        digest = reference_digest(config, data, model, is_base)
        reference = self._find_reference(splits, digest, is_base, run / REFERENCE, resumes)
        self.reference = torch.from_numpy(reference["train"])
        self.held_out_reference = torch.from_numpy(reference["held_out"])

    def draw(self, sequences: list[int]) -> Pairs:
        losses = token_losses(self.language_model, self.batches, sequences, self.accelerator)
        log_p = answer_log_p(losses).requires_grad_()
        reference = self.reference[sequences].view(-1, 2)
        tokens = torch.tensor(losses.tokens).view(-1, 2)
        loss = dpo_loss(log_p, reference, tokens, self.config)
        [weights] = torch.autograd.grad(loss, log_p)
        gains = log_p - reference
        return Pairs(
            self.batches,
            sequences,
            figures={
                "train/rewards/accuracies": accuracy(gains),
                **preference_figures(gains, self.config.beta, "train"),
            },
            answer_weights=dict(zip(sequences, weights.flatten().tolist(), strict=True)),
            share=loss.item() / len(sequences),
        )

    def loss(
        self, log_p: Tensor, drawn: Pairs, group: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.tensor([drawn.answer_weights[sequence] for sequence in group])
        tokens = torch.tensor([drawn.batches.supervised[sequence] for sequence in group])
        total = (weights.repeat_interleave(tokens).to(log_p.device) * log_p).sum()
        # Its gradient is that of the pairs' loss; its value becomes that loss too.
        part = total - total.detach() + len(group) * drawn.share
        return self.accelerator.num_processes * part, {}

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        gains = answer_log_p(losses) - self.held_out_reference.view(-1, 2)
        tokens = torch.tensor(losses.tokens).view(-1, 2)
        pairs = preference_losses(gains, tokens, self.config).float().numpy()
        figures = preference_figures(gains, self.config.beta, "eval")
        one_each = numpy.ones(len(pairs), numpy.int64)
        return TokenLosses(one_each, pairs), {"preferences/accuracy": accuracy(gains), **figures}

    def _find_reference(
        self, splits: dict[str, MicroBatches], digest: str, is_base: bool, kept: Path, resumes: bool
    ) -> dict[str, numpy.ndarray]:
        """[answers] log p of the answers of each split, float64: the run's copy if it resumes; else
        from the cache, or computed and cached."""
        name = f"reference/{digest}"
        cached = cache_dir() / name
        is_main = self.accelerator.is_main_process
        reference = None
        if is_main and resumes:
            reference = read_parsed(kept, load, "Restore it, or train in a new folder.")
        elif is_main and cached.is_dir():
            fix = f"Remove {cached}: it is taken anew."
            reference = read_parsed(cached / REFERENCE, load, fix)
        [reference] = broadcast_object_list([reference])
        reference = reference or self._take_reference(splits, is_base)
        if is_main and not resumes:
            content = save(reference)
            cached_folder(name, lambda folder: write_bytes(folder / REFERENCE, content))
            write_bytes(kept, content)
        return reference

    def _take_reference(
        self, splits: dict[str, MicroBatches], is_base: bool
    ) -> dict[str, numpy.ndarray]:
        if self.accelerator.is_main_process:
            announce("reference", "log p of every answer, once")
        model = self.language_model.model  # full fine-tuning has no adapter
        with model.disable_adapter() if is_base else contextlib.nullcontext():
            return {name: self._log_p(batches) for name, batches in splits.items()}

    def _log_p(self, batches: MicroBatches) -> numpy.ndarray:
        answers = range(len(batches.lengths))
        return -token_losses(self.language_model, batches, answers, self.accelerator).sums()


def reference_digest(config: Config, data: Data, model: Model, is_base: bool) -> str:
    """A digest of the reference, the rows, and what decides how the passes round."""
    start = None
    if not is_base:
        start = config.adapter.start_digest or [to_plain(config.adapter), config.train.seed]
    rows = data.rows.train.digest, data.rows.evaluation.digest
    training = config.train
    passes = training.autocast, training.compile, training.micro_batch_tokens
    accelerator = model.accelerator
    is_flat = model.language_model.is_flat
    machine = is_flat, accelerator.device.type, accelerator.num_processes
    base = to_plain(config.model), model.base
    return digest_of_parts(*base, start, rows, passes, machine)
