"""Whether a server samples by the policy that trains. Two statistics of an update's answers decide:

    distance    the mean of |log p here - log p there| over the sampled tokens, in nats. Two engines
                round differently: what the base without an adapter shows is what rounding explains
    surprise    by Freedman's inequality, how unlikely it is that the likeliest token was sampled as
                often as it was, if the server drew by the log p that it sent. A temperature or a
                top-p that this log p leaves out shows here alone

What the answers look like instead is computed only when they are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cera_train.adapters.families.base import ADAPTER
from cera_train.adapters.saved import keeps_base
from cera_train.cera.layer import CeraLinear
from cera_train.common.errors import UserError
from cera_train.evaluation.held_out import token_losses
from cera_train.evaluation.requests import SampledTokens
from cera_train.model.batches import MicroBatches
from cera_train.model.language_model import LanguageModel
from cera_train.training.build import Model

MOST_A_TOKEN = 1.0
"""Nats that a token differs by, at most: where rounding sends it to another expert, its log p may
be anything."""

TIMES_ROUNDING = 4.0
"""A distance up to this many times the base's counts as rounding: the adapter adds products of its
own, and answers may become less certain than the base's."""

HARMLESS = 1e-3
"""Nats a token; a smaller distance is never refused: it changes a probability by a thousandth."""

MOST_ROUNDING = 0.1
"""Nats a token; a larger distance between two copies of the base is no rounding. SmolLM2-135M in
bfloat16 is 0.03 from itself in float32, in NF4 0.5."""

MOST_SURPRISE = 20.0
"""Nats: sound answers surprise more in at most one of e^20 / 2, or 240 million, updates."""

DISTANCE = "train/sampling/log_p_difference"
LIMIT = "train/sampling/log_p_limit"


# --- the statistics -------------------------------------------------------------------------------


def log_p_distance(here: Tensor, there: Tensor) -> float:
    """Mean distance of the log p of tokens, [N] each, in nats a token."""
    distances = (here - there).abs().nan_to_num(MOST_A_TOKEN)
    return distances.clamp(max=MOST_A_TOKEN).mean().item()


def surprise(highest: Tensor, is_highest: Tensor) -> float:
    """Minus the log of Freedman's bound (Ann. Probab. 3, 1975) on the probability that the
    likeliest token is sampled so much more or less often than its probabilities say.

    Args:
        highest: [N] log p of the likeliest token in each place.
        is_highest: [N] whether it was sampled.
    """
    p = highest.double().exp()
    excess = (is_highest.double() - p).sum().abs()
    variance = (p * (1 - p)).sum().clamp(min=0)
    return (excess.square() / (2 * (variance + excess / 3) + 1e-12)).item()


class Tokens(NamedTuple):
    """The sampled tokens of all answers, one after the other, as the server saw them; [N] each."""

    log_p: Tensor
    highest: Tensor
    is_highest: Tensor

    @staticmethod
    def of(answers: list[SampledTokens]) -> Tokens:
        fields = zip(*answers, strict=True)
        return Tokens(*(torch.tensor([x for part in field for x in part]) for field in fields))


# --- the check ------------------------------------------------------------------------------------


@dataclass
class PolicyCheck:
    """Refuses answers of another policy than the model's.

    Args:
        place: the setting that names the server, for errors.
        limit: the largest accepted distance; None until `measure` finds it.
    """

    place: str
    model: Model
    limit: float | None
    before: list[Tensor] | None = None
    """The trained weights of the last accepted answers."""

    def measure(self, batches: MicroBatches, answers: list[SampledTokens]) -> None:
        """Sets the limit by answers of the server's base, which no adapter changes. Raises
        UserError where rounding does not explain their distance."""
        there = Tokens.of(answers).log_p
        with self.model.adapted.disable_adapter():
            rounding = log_p_distance(self._log_p(batches), there)
            found = temperatures(self.model.language_model, lambda: self._log_p(batches), there)
            suspects = [*found]
        # No temperature explains half of a distance by rounding.
        unexplained = max(HARMLESS, 2 * min(suspect.distance for suspect in suspects))
        limit = min(MOST_ROUNDING, unexplained)
        if rounding > limit:
            self._refuse("the base without an adapter", rounding, limit, suspects)
        self.limit = max(HARMLESS, TIMES_ROUNDING * rounding)

    def check(self, batches: MicroBatches, answers: list[SampledTokens]) -> dict[str, float]:
        """Returns figures for metrics.jsonl. Raises UserError where the answers are not the
        model's."""
        tokens = Tokens.of(answers)
        distance = log_p_distance(self._log_p(batches), tokens.log_p)
        if distance > self.limit:
            suspects = [*self._suspects(batches, tokens.log_p)]
            self._refuse("the adapter in training", distance, self.limit, suspects)
        if surprise(tokens.highest, tokens.is_highest) > MOST_SURPRISE:
            sampled = int(tokens.is_highest.sum())
            expected = float(tokens.highest.exp().sum())
            direction = "below" if sampled > expected else "above"
            raise UserError(
                f"{self.place} sampled the likeliest token {sampled:,} times of "
                f"{len(tokens.log_p):,}, and {expected:,.0f} were to be expected by its own log p: "
                f"it samples at a temperature {direction} 1, or from a part of the vocabulary. "
                "Remove what changes the settings of requests, such as a proxy or a plugin."
            )
        self.before = [weight.detach().clone() for weight in self.model.trained]
        return {DISTANCE: distance, LIMIT: self.limit}

    def _log_p(self, batches: MicroBatches) -> Tensor:
        """[N] log p of the answers' tokens under the model as it is."""
        rows = range(len(batches.lengths))
        model = self.model
        losses = token_losses(model.language_model, batches, rows, model.accelerator)
        return -torch.from_numpy(losses.losses)

    def _suspects(self, batches: MicroBatches, there: Tensor) -> Iterator[Suspect]:
        model = self.model
        adapted = model.adapted

        def log_p() -> Tensor:
            return self._log_p(batches)

        with model.language_model.uncompiled():
            for name, change in whole_changes(adapted, model.trained, self.before):
                with change:
                    yield Suspect(name, log_p_distance(log_p(), there))
            yield from missing_parts(adapted, log_p, there)
            yield from temperatures(model.language_model, log_p, there)

    def _refuse(self, policy: str, distance: float, limit: float, suspects: list[Suspect]) -> None:
        nearest = min(suspects, key=lambda suspect: suspect.distance)
        cause = "as none of the usual mistakes would: are its base weights those of this run?"
        if nearest.distance <= limit:
            cause = f"as if by {nearest.name} ({nearest.distance:.2g})."
        raise UserError(
            f"{self.place} answers by another policy than {policy}: its log p are {distance:.2g} "
            f"nats a token away (rounding: at most {limit:.2g}), {cause} Start vLLM again, and the "
            "same command resumes; or allow more by grpo.max_sampler_distance."
        )


# --- what a wrong policy looks like ---------------------------------------------------------------


class Suspect(NamedTuple):
    """Another policy that the answers may come from."""

    name: str
    distance: float
    """Of the server's log p from its."""


def whole_changes(
    adapted: nn.Module, trained: list[nn.Parameter], before: list[Tensor] | None
) -> Iterator[tuple[str, AbstractContextManager]]:
    """Mistakes with all of an adapter: their name, and a context with the model so changed."""
    if keeps_base(adapted):
        yield "the base without an adapter", adapted.disable_adapter()
    if before is not None:
        yield "the adapter of the update before", exchanged(trained, before)
    layers = [layer for layer, _ in scaled_layers(adapted)]
    gated = [layer for layer in layers if isinstance(layer, CeraLinear)]
    if gated:
        yield "the adapter without its gate", ungated(gated)
    root = max((layer.r[ADAPTER] for layer in layers), default=1) ** 0.5
    for factor in (2, 0.5, root, 1 / root):
        yield f"the adapter at {factor:.3g} times its scale", scaled(layers, factor)


def missing_parts(
    adapted: nn.Module, log_p: Callable[[], Tensor], there: Tensor
) -> Iterator[Suspect]:
    """An adapter without a half of its layers, or without some projections: each is taken away or
    put back as long as that lowers the distance."""
    layers = scaled_layers(adapted)
    middle = len(layers) // 2
    for name, part in (("first", layers[:middle]), ("second", layers[middle:])):
        with scaled([layer for layer, _ in part], 0):
            yield Suspect(f"the adapter without its {name} half", log_p_distance(log_p(), there))

    names = sorted({name for _, name in layers})
    missing: set[str] = set()
    nearest = log_p_distance(log_p(), there)
    is_searching = True
    while is_searching:
        is_searching = False
        for name in names:
            candidate = missing ^ {name}
            with scaled([layer for layer, name in layers if name in candidate], 0):
                distance = log_p_distance(log_p(), there)
            if distance < nearest:
                missing = candidate
                nearest = distance
                is_searching = True
    yield Suspect(f"the adapter without {' '.join(sorted(missing))}", nearest)


def temperatures(
    language_model: LanguageModel, log_p: Callable[[], Tensor], there: Tensor
) -> Iterator[Suspect]:
    """The model at temperatures that come nearer to the server's log p: Gauss-Newton steps of the
    inverse temperature, with the slope of the step before."""

    def log_p_at(inverse: float) -> Tensor:
        with at_temperature(language_model, 1 / inverse):
            return log_p()

    inverse_before = 1.0
    before = log_p()
    yield Suspect("a temperature of 1", log_p_distance(before, there))
    inverse = 1.1
    for _ in range(6):
        here = log_p_at(inverse)
        yield Suspect(f"a temperature of {1 / inverse:.2g}", log_p_distance(here, there))
        slope = (here - before) / (inverse - inverse_before)
        step = float(((there - here) * slope).sum() / slope.square().sum())
        if not abs(step) > 1e-4:  # also where no temperature changes log p
            return
        inverse_before = inverse
        before = here
        inverse = min(max(inverse + step, inverse / 2), inverse * 2)


def scaled_layers(adapted: nn.Module) -> list[tuple[BaseTunerLayer, str]]:
    """The projections whose adapter has a scale, in the model's order, and their names."""
    return [
        (module, name.rpartition(".")[2])
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
        and isinstance(getattr(module, "scaling", {}).get(ADAPTER), int | float)
    ]


def scaled(layers: list[BaseTunerLayer], factor: float) -> AbstractContextManager:
    """The branches of these layers count `factor` times inside."""
    scales = [layer.scaling for layer in layers]
    return replaced(scales, [factor * scale[ADAPTER] for scale in scales])


def ungated(layers: list[CeraLinear]) -> AbstractContextManager:
    """The branches of these layers are linear inside."""
    return replaced([layer.cera_gate for layer in layers], [nn.Identity() for _ in layers])


@contextlib.contextmanager
def replaced(parts: Sequence[MutableMapping[str, Any]], values: Sequence[Any]) -> Iterator[None]:
    """The adapter has these values in these parts of layers inside."""
    before = [part[ADAPTER] for part in parts]

    def put(values: Sequence[Any]) -> None:
        for part, value in zip(parts, values, strict=True):
            part[ADAPTER] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
@torch.no_grad()
def exchanged(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have these values inside."""
    held = [parameter.clone() for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, held, strict=True):
            parameter.copy_(value)


@contextlib.contextmanager
def at_temperature(language_model: LanguageModel, temperature: float) -> Iterator[None]:
    """The head's logits are divided by the temperature inside."""
    hook = language_model.head.register_forward_hook(
        lambda head, inputs, logits: logits / temperature
    )
    try:
        yield
    finally:
        hook.remove()
