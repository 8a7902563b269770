"""Rows held out from training, under a model: the losses of their tokens, and the spectra of its
adapter on a probe of them. Processes share the rows out; each takes `language_model` without DDP
around it, so that none waits for others."""

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


@torch.no_grad()
def token_losses(
    language_model: LanguageModel,
    batches: MicroBatches,
    accelerator: Accelerator,
    sequences: Sequence[int] | None = None,
) -> TokenLosses:
    """The loss of every supervised token of these sequences, by default of all, in eval mode; equal
    on every process."""
    if sequences is None:
        sequences = range(len(batches.lengths))
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


def probe_spectra(
    language_model: LanguageModel, batches: MicroBatches, accelerator: Accelerator
) -> dict[str, ModuleSpectrum]:
    """The spectrum of every adapted module on the probe."""
    groups = batches.of_process(accelerator, batches.first(PROBE_TOKENS))
    probe = ((batches.load(group), counts) for group, counts in groups)
    with language_model.uncompiled():
        return measure_spectra(language_model.model, language_model, probe, accelerator.reduce)
