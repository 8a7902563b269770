"""`adapter.start_from`: a new run begins with another adapter's weights, which its config names with their digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from cera_train.adapters.build import load, read
from cera_train.common.errors import UserError
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import Environment
from cera_train.runs.subject import digest_of, find_start, run_of
from cera_train.settings.adapters import AdapterConfig


def settle_start(config: AdapterConfig, begun: AdapterConfig) -> AdapterConfig:
    """The settings with the digest of the weights to start from: as the run was begun, so that it can be resumed when
    these are gone; else of the weights as they are. Raises UserError where they do not fit."""
    if config.start_from is None:
        return config
    if config.start_from == begun.start_from and begun.start_digest is not None:
        return replace(config, start_digest=begun.start_digest)
    return replace(config, start_digest=digest_of(find_start(config)))


def load_start(model: nn.Module, config: AdapterConfig, base_fingerprint: str) -> None:
    """Puts the weights to start from into a fresh adapter. Raises UserError where they are not those of the digest, or
    were trained on another base."""
    place, folder = f"adapter.start_from={config.start_from}", find_start(config)
    if (digest := digest_of(folder)) != config.start_digest:
        raise UserError(
            f"{place}: its weights have the digest {digest} now, and this run was begun with {config.start_digest}. "
            "Restore them, or choose another name=... for a run from the new ones."
        )
    run = run_of(folder)
    record = run / "environment.json" if run is not None else Path()
    if record.is_file() and Environment.read(record).base_fingerprint not in (None, base_fingerprint):
        raise UserError(
            f"{place} was trained on other base weights than these: set model.path to its base "
            f"({load_config(run / 'config.yaml').model.path}), or start from another adapter."
        )
    try:
        load(model, read(folder))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
