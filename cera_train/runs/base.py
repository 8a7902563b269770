"""Whether a base model is the one that a run was trained on: an adapter loads on any base of its
shapes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cera_train.common.errors import UserError
from cera_train.data.tokens import tokenizer_digests
from cera_train.model.identity import BaseIdentity
from cera_train.runs.records import load_config
from cera_train.runs.results import Environment
from cera_train.settings.model import Dtype, ModelConfig


def check_base(
    trained: str | Path,
    run: Path,
    model: ModelConfig,
    now: BaseIdentity,
    fix: str,
    base: nn.Module | None = None,
) -> None:
    """Raises UserError where a run recorded another base than `model`.

    Args:
        trained: what was trained, for the message.
        now: the identity of `model`.
        base: `model` as it was loaded, before an adapter is added; None where a server has it.
    """
    recorded = Environment.find(run / "environment.json") or Environment()
    difference = ""
    if recorded.base_config is not None:
        then = BaseIdentity(recorded.base_weights, recorded.base_config)
        difference = then.difference(now)
    elif base is not None and _differs_from_early_record(
        run, recorded.base_fingerprint, model, base
    ):
        difference = "other weights"
    if difference:
        raise UserError(
            f"{trained} was trained on another base than model.path={model.path} is now: "
            f"{difference}. {fix}"
        )


def changed_tokenizer(run: Path, tokenizer: Any) -> str:
    """What of the base's tokenizer is not as the run recorded it, in words; empty if nothing
    changed, or where nothing is on record."""
    recorded = (Environment.find(run / "environment.json") or Environment()).tokenizer or {}
    now = tokenizer_digests(tokenizer)
    changed = [name for name, digest in recorded.items() if now.get(name) != digest]
    return f"the {' and the '.join(changed)} of the base" if changed else ""


# --- cera-train 0.2.0 -----------------------------------------------------------------------------


def _differs_from_early_record(
    run: Path, recorded: str | None, model: ModelConfig, base: nn.Module
) -> bool:
    """Whether a loaded base differs from the record of cera-train 0.2.0: a digest of the
    one-dimensional weights, such as norms."""
    dtype = load_config(run / "config.yaml", section="model").dtype
    if recorded is None or (dtype != model.dtype and Dtype.float16 in (dtype, model.dtype)):
        return False  # float16 rounds first, and bfloat16 below then rounds otherwise
    norms = hashlib.sha256()
    for name, parameter in base.named_parameters():
        if parameter.ndim == 1:
            values = parameter.detach().to(torch.bfloat16).contiguous().cpu().view(torch.uint8)
            norms.update(f"{name} ".encode() + values.numpy().tobytes())
    return recorded != norms.hexdigest()[:16]
