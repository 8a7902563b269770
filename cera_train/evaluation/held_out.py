"""Rows held out from training, under a model: their perplexity, and the spectra of its adapter on a probe of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cera_train.adapters.spectrum import ModuleSpectrum, measure_spectra
from cera_train.data.batches import Batch, MicroBatches
from cera_train.data.prepare import TokenizedRows
from cera_train.distributed.team import Team
from cera_train.model.loss import SupervisedLoss, mean_loss


class HeldOut:
    """Evaluation rows, shared out over the processes of a team.

    Args:
        loss: without DDP around it: processes evaluate without waiting for others.
        probe_tokens: tokens of the first rows, on which spectra are taken.
    """

    def __init__(
        self,
        model: Any,
        loss: SupervisedLoss,
        rows: TokenizedRows,
        team: Team,
        micro_batch_tokens: int,
        probe_tokens: int,
    ) -> None:
        self.model, self.loss, self.team = model, loss, team
        self.batches = MicroBatches(rows, loss.is_flat, micro_batch_tokens, team.device)
        self.rows, self.probe = range(len(rows)), self.batches.first(probe_tokens)

    def mean_loss(self) -> float:
        """Mean loss of a supervised token in nats."""
        return mean_loss(self.loss, self._mine(self.rows), self.team.reduce)

    def spectra(self) -> dict[str, ModuleSpectrum]:
        """The spectrum of every adapted module on the probe."""
        return measure_spectra(self.model, self.loss.eagerly, self._mine(self.probe), self.team.reduce)

    def _mine(self, rows: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """This process's micro-batches, and whether each counts."""
        team = self.team
        passes = self.batches.passes(rows, team.processes, team.process, in_step=team.is_sharded)
        for (group, counts), _ in team.passes(passes):
            yield self.batches.load(group), counts
