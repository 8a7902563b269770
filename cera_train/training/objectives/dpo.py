"""Direct preference optimisation, arXiv 2305.18290, on pairs of a chosen and a rejected answer:

    loss = -log sigmoid(beta margin),    margin = log p / p_ref (chosen) - log p / p_ref (rejected)

The two answers of a pair may lie in different micro-batches and processes. So a pass without
gradients first takes log p of every answer of an update; the derivative of the loss by it is the
weight of that answer's gradient in the passes that follow. On the held-out pairs exp of the loss is
the perplexity of the choice: 2 for a coin's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from accelerate.utils import broadcast_object_list
from safetensors.numpy import load, save
from torch import Tensor
from torch.nn.functional import logsigmoid

from cera_train.adapters.saved import keeps_base
from cera_train.common.files import cache_dir, cached_folder, read_parsed, write_bytes
from cera_train.common.settings import to_plain
from cera_train.common.terminal import announce
from cera_train.data.prepare import digest_of_parts
from cera_train.evaluation.held_out import token_losses
from cera_train.runs.results import TokenLosses
from cera_train.settings.training import DpoConfig, PreferenceLoss, Reference
from cera_train.training.objectives import Drawn, Sft

if TYPE_CHECKING:
    from cera_train.training.session import Session

REFERENCE = "reference.safetensors"
"""Log p of every answer under the reference: in the cache, and in the run's folder, which resumes
without the cache."""


def pair_losses(gains: Tensor, tokens: Tensor, config: DpoConfig) -> Tensor:
    """The loss of each pair, without the term of supervised fine-tuning.

    Args:
        gains: [pairs, 2] log p - log p_ref of the chosen and the rejected answer.
        tokens: [pairs, 2] their lengths.
    """
    if config.loss == PreferenceLoss.ipo:
        chosen, rejected = (gains / tokens).T
        return (chosen - rejected - 1 / (2 * config.beta)) ** 2
    margins = config.beta * (gains[:, 0] - gains[:, 1])
    wrong = config.label_smoothing
    return -(1 - wrong) * logsigmoid(margins) - wrong * logsigmoid(-margins)


def rewards(gains: Tensor, beta: float, prefix: str) -> dict[str, float]:
    """The figures of pairs by their usual names."""
    chosen, rejected = (beta * gains.detach()).T
    figures = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
    return {f"{prefix}/rewards/{name}": float(values.mean()) for name, values in figures.items()}


class Dpo(Sft):
    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config.dpo
        is_base = (
            session.config.adapter.start_from is None or self.config.reference == Reference.base
        )
        self.is_base = is_base and keeps_base(session.model)
        reference = self._find_reference()
        self.reference, self.held_out_reference = (
            torch.from_numpy(reference[name]) for name in ("train", "held_out")
        )

    def begin(self, rows: list[int]) -> Drawn:
        session = self.session
        config = self.config
        losses = token_losses(session.local_loss, session.batches, rows, session.accelerator)
        log_p = _log_p(losses).requires_grad_()
        gains = log_p - self.reference[rows].view(-1, 2)
        tokens = torch.tensor(losses.tokens).view(-1, 2)
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
        return self.session.accelerator.num_processes * (
            total - total.detach() + len(group) * self._value
        )

    def judge(self, losses: TokenLosses) -> tuple[TokenLosses, dict[str, float]]:
        gains = _log_p(losses) - self.held_out_reference.view(-1, 2)
        of_pairs = (
            pair_losses(gains, torch.tensor(losses.tokens).view(-1, 2), self.config).float().numpy()
        )
        accuracy = (gains[:, 0] > gains[:, 1]).float().mean().item()
        judged = TokenLosses(numpy.ones(len(of_pairs), numpy.int64), of_pairs)
        return judged, {"preferences/accuracy": accuracy} | rewards(gains, self.config.beta, "eval")

    def _find_reference(self) -> dict[str, numpy.ndarray]:
        """The run's copy where it resumes; else from the cache, or taken for it."""
        session = self.session
        name = f"reference/{self._digest()}"
        reference = None
        kept = session.folder.path / REFERENCE
        cached = cache_dir() / name
        is_main = session.accelerator.is_main_process
        if is_main and session.resumes:
            reference = read_parsed(kept, load, "Restore it, or train in a new folder.")
        elif is_main and cached.is_dir():
            reference = read_parsed(cached / REFERENCE, load, f"Remove {cached}: it is taken anew.")
        [reference] = broadcast_object_list([reference])
        reference = reference or self._take_reference()
        if is_main and not session.resumes:
            cached_folder(name, lambda folder: write_bytes(folder / REFERENCE, save(reference)))
            write_bytes(kept, save(reference))
        return reference

    def _digest(self) -> str:
        """A digest of the model, the rows, and what decides how the passes round."""
        session = self.session
        config = self.session.config
        accelerator = self.session.accelerator
        start = (
            None
            if self.is_base
            else config.adapter.start_digest or [to_plain(config.adapter), config.train.seed]
        )
        rows = session.data.train.digest, session.data.evaluation.digest
        passes = config.train.autocast, config.train.compile, config.train.micro_batch_tokens
        machine = session.local_loss.is_flat, accelerator.device.type, accelerator.num_processes
        return digest_of_parts(
            to_plain(config.model), session.base_digest, start, rows, passes, machine
        )

    def _take_reference(self) -> dict[str, numpy.ndarray]:
        """[rows] log p of the training and of the held-out answers, float64."""
        # Of the base with the adapter off, which runs of other adapters share, or of the adapter as
        # the run starts.
        session = self.session
        reference = {}
        if session.accelerator.is_main_process:
            announce("reference", "log p of every answer, once")
        with session.model.disable_adapter() if self.is_base else contextlib.nullcontext():
            for name, batches in (
                ("train", session.batches),
                ("held_out", session.held_out.batches),
            ):
                rows = range(len(batches.lengths))
                losses = token_losses(session.local_loss, batches, rows, session.accelerator)
                reference[name] = -losses.sums()
        return reference


def _log_p(losses: TokenLosses) -> Tensor:
    """[pairs, 2] log p of the chosen and the rejected answers, float64."""
    return -torch.from_numpy(losses.sums()).view(-1, 2)
