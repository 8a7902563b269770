"""Direct preference optimisation, arXiv 2305.18290, on pairs of a chosen and a rejected answer:

    loss = -log sigmoid(beta margin),    margin = log p / p_ref (chosen) - log p / p_ref (rejected)

The two answers of a pair may lie in different micro-batches and processes. So a pass without gradients first takes
log p of every answer of an update; the derivative of the loss by it is the weight of that answer's gradient in the
passes that follow. On the held-out pairs exp of the loss is the perplexity of the choice: 2 for a coin's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn.functional import logsigmoid

from cera_train.common.files import write_bytes
from cera_train.common.terminal import announce
from cera_train.evaluation.held_out import token_losses
from cera_train.runs.results import TokenLosses
from cera_train.settings.training import DpoConfig, PreferenceLoss, Reference
from cera_train.training.objectives import Drawn, Objective

if TYPE_CHECKING:
    from cera_train.training.session import Session

REFERENCE = "reference.safetensors"
"""In a run's folder: log p of every answer under the reference, taken at the start, whose weights are gone later."""


def pair_losses(gains: Tensor, tokens: Tensor, config: DpoConfig) -> Tensor:
    """The loss of each pair, without the term of supervised fine-tuning.

    Args:
        gains: [pairs, 2] log p - log p_ref of the chosen and the rejected answer.
        tokens: [pairs, 2] their lengths.
    """
    if config.loss == PreferenceLoss.ipo:
        chosen, rejected = (gains / tokens).T
        return (chosen - rejected - 1 / (2 * config.beta)) ** 2
    margins, wrong = config.beta * (gains[:, 0] - gains[:, 1]), config.label_smoothing
    return -(1 - wrong) * logsigmoid(margins) - wrong * logsigmoid(-margins)


def rewards(gains: Tensor, beta: float, prefix: str) -> dict[str, float]:
    """The figures of pairs by their usual names."""
    chosen, rejected = (beta * gains.detach()).T
    figures = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
    return {f"{prefix}/rewards/{name}": float(values.mean()) for name, values in figures.items()}


class Dpo(Objective):
    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config.dpo
        file = session.folder.path / REFERENCE
        reference = load_file(file) if session.resumes else self._take_reference()
        if session.accelerator.is_main_process:
            write_bytes(file, save(reference))
        self.reference, self.held_out_reference = (torch.from_numpy(reference[name]) for name in ("train", "held_out"))

    def begin(self, rows: list[int]) -> Drawn:
        session, config = self.session, self.config
        losses = token_losses(session.local_loss, session.batches, rows, session.accelerator)
        log_p = _log_p(losses).requires_grad_()
        gains, tokens = log_p - self.reference[rows].view(-1, 2), torch.tensor(losses.tokens).view(-1, 2)
        loss = pair_losses(gains, tokens, config).mean()
        loss = loss - config.sft_weight * log_p[:, 0].sum() / tokens[:, 0].sum()
        [gradient] = torch.autograd.grad(loss, log_p)
        self._weights = dict(zip(rows, (-gradient).flatten().tolist(), strict=True))
        self._value = loss.item() / len(rows)
        accuracy = (gains[:, 0] > gains[:, 1]).float().mean().item()
        figures = {"train/rewards/accuracies": accuracy} | rewards(gains, config.beta, "train")
        return Drawn(session.batches, rows, figures)

    def loss(self, losses: Tensor, group: Sequence[int]) -> Tensor:
        weights = torch.tensor([self._weights[row] for row in group])
        tokens = torch.tensor([self.session.batches.supervised[row] for row in group])
        total = (weights.repeat_interleave(tokens).to(losses.device) * losses).sum()
        # Its gradient is that of the pairs' loss; its value becomes this loss, too.
        return self.session.accelerator.num_processes * (total - total.detach() + len(group) * self._value)

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        gains = _log_p(losses) - self.held_out_reference.view(-1, 2)
        of_pairs = pair_losses(gains, torch.tensor(losses.tokens).view(-1, 2), self.config).float().numpy()
        accuracy = (gains[:, 0] > gains[:, 1]).float().mean().item()
        judged = TokenLosses(numpy.ones(len(of_pairs), numpy.int64), of_pairs)
        return judged, {"preferences/accuracy": accuracy} | rewards(gains, self.config.beta, "eval")

    def _take_reference(self) -> dict[str, numpy.ndarray]:
        """[rows] log p of the training and of the held-out answers, float64."""
        session, reference = self.session, {}
        is_base = session.config.adapter.start_from is not None and self.config.reference == Reference.base
        announce("reference", "log p of every answer, once")
        with session.model.disable_adapter() if is_base else contextlib.nullcontext():
            for name, batches in (("train", session.batches), ("held_out", session.held_out.batches)):
                rows = range(len(batches.lengths))
                losses = token_losses(session.local_loss, batches, rows, session.accelerator)
                reference[name] = -losses.sums()
        return reference


def _log_p(losses: TokenLosses) -> Tensor:
    """[pairs, 2] log p of the chosen and the rejected answers, float64."""
    return -torch.from_numpy(losses.sums()).view(-1, 2)
