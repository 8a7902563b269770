"""Which runs can train on one base together. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cera_train.common.settings import flatten, to_plain
from cera_train.settings.model import Dtype, Quantization
from cera_train.settings.run import Config

SHARED = (
    *("model.", "data.", "distributed.", "train.batch_size", "train.micro_batch_tokens", "train.batch_layout"),
    *("train.compile", "train.autocast"),
)
"""Settings, or starts of settings, in which jobs on one base are alike. In all others they may differ."""

CPU_PASS_TOKENS = 1536
"""A CPU gains little by more tokens in a pass, and they take memory. Eight runs of SmolLM2-135M, 576 tokens each, on
two cores in bf16: 940, 1,010 and 1,040 tokens/s with one, three and four of them in a pass, 1.6, 2.3 and 3.4 GB."""


@dataclass(frozen=True)
class Pack:
    """Jobs, by their numbers, that train together; or one that trains alone."""

    jobs: list[int]
    reason: str = ""
    """Why one is alone, where it could not be otherwise."""


def pass_tokens(config: Config, on_gpu: bool) -> int:
    """Tokens of a pass that runs share, at most."""
    most = config.train.micro_batch_tokens
    return most if on_gpu else min(most, max(CPU_PASS_TOKENS, config.data.max_length))


def shared_settings(config: Config) -> dict[str, Any]:
    """What jobs on one base have in common."""
    return {key: value for key, value in flatten(to_plain(config)).items() if key.startswith(SHARED)}


def why_alone(config: Config) -> str:
    """The setting for which a job cannot train beside others; empty where it can."""
    adapter, model = config.adapter, config.model
    reasons = {
        f"adapter.kind={adapter.kind}": not adapter.family.joins,
        "adapter.settings": bool(adapter.settings),
        "adapted experts": bool(adapter.adapted_experts),
        "adapter.unfused=true": adapter.unfused,
        "train.compile=true": config.train.compile,
        # A gradient scaler skips the updates of all; LLM.int8() finds its outliers over all tokens of a pass.
        "model.dtype=float16": model.dtype == Dtype.float16,
        "model.quantization=int8": model.quantization == Quantization.int8,
        f"distributed.strategy={config.distributed.strategy}": config.distributed.strategy != "ddp",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def pack_jobs(configs: Sequence[Config], most: Callable[[Sequence[Config]], int]) -> list[Pack]:
    """The jobs in packs, in the order of their first jobs.

    Args:
        most: how many of these jobs, from the first on, one pack may hold; at least 1.
    """
    alike: dict[str, list[int]] = {}
    alone = []
    for number, config in enumerate(configs):
        if reason := why_alone(config):
            alone.append(Pack([number], reason))
        else:
            alike.setdefault(repr(shared_settings(config)), []).append(number)
    packs = []
    for numbers in alike.values():
        while numbers:
            count = most([configs[number] for number in numbers]) if len(numbers) > 1 else 1
            packs.append(Pack(numbers[:count]))
            numbers = numbers[count:]
    return sorted([*packs, *alone], key=lambda pack: pack.jobs[0])


def describe_packs(packs: Sequence[Pack]) -> str:
    """What trains with what, in a line."""
    sizes = [str(len(pack.jobs)) for pack in packs if len(pack.jobs) > 1]
    reasons = sorted({pack.reason for pack in packs if pack.reason})
    others = sum(len(pack.jobs) == 1 for pack in packs)
    together = f"{' + '.join(sizes)} jobs share a base" if sizes else "no jobs share a base"
    why = f" ({', '.join(reasons)})" if reasons else ""
    return f"{together}{f', {others} alone{why}' if others else ''}"
