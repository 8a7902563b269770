"""Rows held out from training, under a model: the losses of their tokens, and the spectra of its adapter on a probe of
them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from accelerate import Accelerator

from cera_train.adapters.spectrum import ModuleSpectrum, measure_spectra
from cera_train.data.prepare import TokenizedRows
from cera_train.model.batches import MicroBatches
from cera_train.model.loss import SupervisedLoss
from cera_train.runs.outcomes import TokenLosses


class HeldOut:
    """Evaluation rows, shared out over the processes of a run.

    Args:
        loss: without DDP around it: processes evaluate without waiting for others.
        probe_tokens: tokens of the first rows, on which spectra are taken.
    """

    def __init__(
        self,
        model: Any,
        loss: SupervisedLoss,
        rows: TokenizedRows,
        accelerator: Accelerator,
        micro_batch_tokens: int,
        probe_tokens: int,
    ) -> None:
        self.model, self.loss, self.accelerator = model, loss, accelerator
        self.batches = MicroBatches(rows, loss.is_flat, micro_batch_tokens, accelerator.device)
        self.rows, self.probe = range(len(rows)), self.batches.first(probe_tokens)

    @torch.no_grad()
    def token_losses(self) -> TokenLosses:
        """The loss of every supervised token, in eval mode; the same on every process."""
        supervised = self.batches.supervised
        starts = [0, *itertools.accumulate(supervised)]
        losses = torch.zeros(starts[-1], device=self.accelerator.device)
        was_training = self.loss.training
        self.loss.eval()
        for group, counts in self._mine(self.rows):
            token_losses = self.loss(self.batches.load(group), by_token=True)
            if counts:
                for row, row_losses in zip(group, token_losses.split([supervised[row] for row in group]), strict=True):
                    losses[starts[row] : starts[row + 1]] = row_losses
        self.loss.train(was_training)
        # Zero where another process has the row, so a sum puts them together without rounding.
        return TokenLosses(numpy.array(supervised, numpy.int64), self.accelerator.reduce(losses).cpu().numpy())

    def spectra(self) -> dict[str, ModuleSpectrum]:
        """The spectrum of every adapted module on the probe."""
        probe = ((self.batches.load(group), counts) for group, counts in self._mine(self.probe))
        with self.loss.uncompiled():
            return measure_spectra(self.model, self.loss, probe, self.accelerator.reduce)

    def _mine(self, rows: Sequence[int]) -> list[tuple[list[int], bool]]:
        """The rows of this process's micro-batches, and whether each counts."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        return self.batches.passes(rows, processes, process, in_step=self.accelerator.is_fsdp2)
