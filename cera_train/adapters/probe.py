"""Passes of a base whose adapter has moved from its start: the adapter computes, changes the
logits, draws no numbers in evaluation, and lets no token see a later one or another row.

At its start an adapter changes nothing, and a pass of training shows none of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cera_train.adapters.families import place_of
from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.settings.adapters import AdapterConfig

MOVED = 0.1
"""Standard deviation of what is added to each trained weight."""

SAME = 1e-4
"""Relative difference up to which logits count as equal. Shapes are equal: only experts, whose
tokens change, round differently, and those of the base too."""


@torch.no_grad()
def check_effect(
    model: nn.Module,
    base: PreTrainedModel,
    config: AdapterConfig,
    pass_twice: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
) -> None:
    """Raises UserError for an adapter whose losses would not be those of a language model, or that
    has no effect.

    Args:
        pass_twice: `model.layout.pass_padded` of the model, from tokens of the first sequence.
    """
    tokens = config.settings.get("token_indices", [])  # TRAINABLE_TOKENS trains no others
    was_training = model.training
    model.eval()
    with errors_beside(base, config):
        start, of_base = pass_twice(tokens)
        with moved(model):
            there, of_adapter = pass_twice(tokens)
            again, _ = pass_twice(tokens)
    model.train(was_training)
    place = place_of(config)
    fix = "set model.quantization=none" if is_quantised(base) else "choose another"
    require(
        not torch.equal(there, start),
        f"{place}: its weights change nothing in this model, so nothing would be learnt: {fix}.",
    )
    off = "choose another, or set train.check_coverage=false"
    require(
        torch.equal(there, again) or not there.isfinite().all(),
        f"{place}: it draws random numbers in evaluation, so no figure could be repeated: {off}.",
    )
    require(
        not of_adapter > max(SAME, 30 * of_base),
        f"{place}: what it adds to a token depends on later tokens, or on other rows of the "
        f"micro-batch, so its losses are not those of a language model: {off}.",
    )


@contextlib.contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """Adds noise to the trained weights inside the context."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in trained:
            weight.data += MOVED * torch.randn_like(weight)
    try:
        yield
    finally:
        for weight, values in zip(trained, before, strict=True):
            weight.data.copy_(values)


@contextlib.contextmanager
def errors_beside(base: PreTrainedModel, config: AdapterConfig) -> Iterator[None]:
    """Turns whatever a method raises beside quantised weights, which many of PEFT's read as if they
    were whole, or without weights, as in a plan, into a UserError."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        has_no_weights = base.device.type == "meta"
        is_ours = not isinstance(cause, NotImplementedError | RuntimeError)
        if is_ours or not (has_no_weights or is_quantised(base)):
            raise
        what = "does not work beside quantised weights: set model.quantization=none"
        if has_no_weights:
            what = "computes with the base's weights as it is built, and a plan has none"
        raise UserError(f"{place_of(config)} {what}.") from error


def is_quantised(base: PreTrainedModel) -> bool:
    return getattr(base, "is_quantized", False)
