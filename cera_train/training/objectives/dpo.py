"""Direct preference optimisation, arXiv 2305.18290, on pairs of a chosen and a rejected answer:

    loss = -log sigmoid(beta margin),    margin = log p / p_ref (chosen) - log p / p_ref (rejected)

The two answers of a pair may lie in different micro-batches and processes. So a pass without
gradients first computes log p of every answer of an update; the derivative of the loss with respect
to it weights that answer's gradient in the passes that follow. On the held-out pairs, exp of the
loss is the perplexity of the choice: 2 for a coin flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from accelerate.utils import broadcast_object_list
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cera_train.common.files import read_parsed, write_bytes
from cera_train.common.terminal import announce
from cera_train.evaluation.held_out import token_losses
from cera_train.model.batches import MicroBatches
from cera_train.runs.results import TokenLosses
from cera_train.settings.run import Config
from cera_train.training.build import Data, Model
from cera_train.training.objectives.objective import Objective, Update

REFERENCE = "reference.safetensors"
"""File in the run's folder: log p of every answer under the reference."""


# --- the loss -------------------------------------------------------------------------------------


def preference_losses(gains: Tensor, beta: float) -> Tensor:
    """[pairs] losses.

    Args:
        gains: [pairs, 2] log p - log p_ref of the chosen and the rejected answer.
    """
    return -logsigmoid(beta * (gains[:, 0] - gains[:, 1]))


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


class Dpo(Objective):
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
        self.beta = config.dpo.beta
        self.language_model = model.language_model
        self.accelerator = model.accelerator
        self.batches = model.micro_batches(data.rows.train)
        turn_dropout_off(model.adapted)
        splits = {"train": self.batches, "held_out": held_out}
        reference = self._find_reference(splits, run / REFERENCE, resumes)
        self.reference = torch.from_numpy(reference["train"])
        self.held_out_reference = torch.from_numpy(reference["held_out"])

    def draw(self, sequences: list[int]) -> Update:
        losses = token_losses(self.language_model, self.batches, self.accelerator, sequences)
        log_p = answer_log_p(losses).requires_grad_()
        gains = log_p - self.reference[sequences].view(-1, 2)
        whole = preference_losses(gains, self.beta).mean()
        [gradient] = torch.autograd.grad(whole, log_p)
        weights = dict(zip(sequences, gradient.flatten().tolist(), strict=True))
        share = whole.item() / len(sequences)
        figures = {"train/rewards/accuracies": accuracy(gains)}
        figures |= preference_figures(gains, self.beta, "train")

        def loss(log_p: Tensor, group: Sequence[int]) -> Tensor:
            answers = torch.tensor([weights[sequence] for sequence in group])
            lengths = torch.tensor([self.batches.supervised[sequence] for sequence in group])
            total = (answers.repeat_interleave(lengths).to(log_p.device) * log_p).sum()
            # Its gradient is that of the pairs' loss; its value becomes that loss too.
            part = total - total.detach() + len(group) * share
            return self.accelerator.num_processes * part

        return Update(self.batches, sequences, loss, figures=figures)

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        gains = answer_log_p(losses) - self.held_out_reference.view(-1, 2)
        pairs = preference_losses(gains, self.beta).float().numpy()
        figures = preference_figures(gains, self.beta, "eval")
        one_each = numpy.ones(len(pairs), numpy.int64)
        return TokenLosses(one_each, pairs), {"preferences/accuracy": accuracy(gains), **figures}

    def _find_reference(
        self, splits: dict[str, MicroBatches], kept: Path, resumes: bool
    ) -> dict[str, numpy.ndarray]:
        """[answers] log p of the answers of each split by the model that the run starts from,
        float64: computed and kept as it starts."""
        is_main = self.accelerator.is_main_process
        if resumes:
            fix = "Restore it, or train in a new folder."
            found = read_parsed(kept, load, fix) if is_main else None
            [found] = broadcast_object_list([found])
            return found
        if is_main:
            announce("reference", "log p of every answer, once")
        reference = {name: self._log_p(batches) for name, batches in splits.items()}
        if is_main:
            write_bytes(kept, save(reference))
        return reference

    def _log_p(self, batches: MicroBatches) -> numpy.ndarray:
        return -token_losses(self.language_model, batches, self.accelerator).sums()
