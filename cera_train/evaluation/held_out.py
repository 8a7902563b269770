"""Rows held out from training, under a model: the losses of their tokens, and the spectra of its
adapter on a probe of them."""

import itertools
from collections.abc import Sequence

import numpy
import torch
from accelerate import Accelerator

from cera_train.adapters.spectrum import ModuleSpectrum, measure_spectra
from cera_train.model.batches import MicroBatches
from cera_train.model.language_model import LanguageModel
from cera_train.runs.results import TokenLosses

PROBE_TOKENS = 2048
"""Tokens of the first held-out rows, on which spectra are taken."""


class HeldOut:
    """Held-out rows, shared out over the processes of a run.

    Args:
        language_model: without DDP around it: processes evaluate without waiting for others.
        batches: micro-batches of the rows.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        batches: MicroBatches,
        accelerator: Accelerator,
    ) -> None:
        self.language_model = language_model
        self.batches = batches
        self.accelerator = accelerator
        self.sequences = range(len(batches.lengths))
        self.probe = batches.first(PROBE_TOKENS)

    def token_losses(self) -> TokenLosses:
        """The loss of every supervised token."""
        return token_losses(self.language_model, self.batches, self.sequences, self.accelerator)

    def spectra(self) -> dict[str, ModuleSpectrum]:
        """The spectrum of every adapted module on the probe."""
        language_model = self.language_model
        groups = self.batches.of_process(self.accelerator, self.probe)
        probe = ((self.batches.load(group), counts) for group, counts in groups)
        with language_model.uncompiled():
            return measure_spectra(
                language_model.model, language_model, probe, self.accelerator.reduce
            )


@torch.no_grad()
def token_losses(
    language_model: LanguageModel,
    batches: MicroBatches,
    sequences: Sequence[int],
    accelerator: Accelerator,
) -> TokenLosses:
    """The loss of every supervised token of these sequences, in eval mode; equal on every
    process."""
    supervised = [batches.supervised[sequence] for sequence in sequences]
    starts = dict(zip(sequences, itertools.accumulate(supervised, initial=0), strict=False))
    losses = torch.zeros(sum(supervised), device=accelerator.device)
    was_training = language_model.training
    language_model.eval()
    for group, counts in batches.of_process(accelerator, sequences):
        group_losses = language_model(batches.load(group))
        if not counts:
            continue
        by_sequence = group_losses.split([batches.supervised[sequence] for sequence in group])
        for sequence, part in zip(group, by_sequence, strict=True):
            losses[starts[sequence] :][: len(part)] = part
    language_model.train(was_training)
    # Zero where another process has the sequence, so a sum puts them together without rounding.
    total = accelerator.reduce(losses).cpu().numpy()
    return TokenLosses(numpy.array(supervised, numpy.int64), total)
