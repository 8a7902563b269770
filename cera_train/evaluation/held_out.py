"""Rows held out from training, under a model: the losses of their tokens, and the spectra of its
adapter on a probe of them."""

import itertools
from collections.abc import Sequence

import numpy
import torch
from accelerate import Accelerator

from cera_train.adapters.spectrum import ModuleSpectrum, measure_spectra
from cera_train.data.prepare import TokenizedRows
from cera_train.model.batches import MicroBatches
from cera_train.model.loss import SupervisedLoss
from cera_train.runs.results import TokenLosses


class HeldOut:
    """Evaluation rows, shared out over the processes of a run.

    Args:
        loss: without DDP around it: processes evaluate without waiting for others.
        probe_tokens: tokens of the first rows, on which spectra are taken.
    """

    def __init__(
        self,
        loss: SupervisedLoss,
        rows: TokenizedRows,
        accelerator: Accelerator,
        micro_batch_tokens: int,
        probe_tokens: int,
    ) -> None:
        self.loss = loss
        self.accelerator = accelerator
        self.batches = MicroBatches(rows, loss.is_flat, micro_batch_tokens, accelerator.device)
        self.rows = range(len(rows))
        self.probe = self.batches.first(probe_tokens)

    def token_losses(self) -> TokenLosses:
        """The loss of every supervised token."""
        return token_losses(self.loss, self.batches, self.rows, self.accelerator)

    def spectra(self) -> dict[str, ModuleSpectrum]:
        """The spectrum of every adapted module on the probe."""
        groups = shared_out(self.batches, self.probe, self.accelerator)
        probe = ((self.batches.load(group), counts) for group, counts in groups)
        with self.loss.uncompiled():
            return measure_spectra(self.loss.model, self.loss, probe, self.accelerator.reduce)


@torch.no_grad()
def token_losses(
    loss: SupervisedLoss, batches: MicroBatches, rows: Sequence[int], accelerator: Accelerator
) -> TokenLosses:
    """The loss of every supervised token of these rows, in eval mode; the same on every process."""
    supervised = [batches.supervised[row] for row in rows]
    starts = dict(zip(rows, itertools.accumulate(supervised, initial=0), strict=False))
    losses = torch.zeros(sum(supervised), device=accelerator.device)
    was_training = loss.training
    loss.eval()
    for group, counts in shared_out(batches, rows, accelerator):
        of_rows = loss(batches.load(group), by_token=True).split(
            [batches.supervised[row] for row in group]
        )
        for row, row_losses in zip(group, of_rows, strict=True) if counts else ():
            losses[starts[row] :][: len(row_losses)] = row_losses
    loss.train(was_training)
    # Zero where another process has the row, so a sum puts them together without rounding.
    return TokenLosses(
        numpy.array(supervised, numpy.int64), accelerator.reduce(losses).cpu().numpy()
    )


def shared_out(
    batches: MicroBatches, rows: Sequence[int], accelerator: Accelerator
) -> list[tuple[list[int], bool]]:
    """The rows of this process's micro-batches, and whether each counts."""
    processes = accelerator.num_processes
    process = accelerator.process_index
    return batches.passes(rows, processes, process, in_step=accelerator.is_fsdp2)
