"""Whether a base model is the one that a run was trained on: an adapter loads on any base of its
shapes."""

from __future__ import annotations

from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.model.identity import BaseIdentity
from cera_train.runs.results import environment_of
from cera_train.settings.model import ModelConfig


def check_base(
    trained: str | Path, run: Path, model: ModelConfig, now: BaseIdentity, fix: str
) -> None:
    """Raises UserError where a run recorded another base than `model`.

    Args:
        trained: what was trained, for the message.
        now: the identity of `model`.
    """
    recorded = environment_of(run)
    if recorded.base_config is None:  # as cera-train 0.2.0
        return
    then = BaseIdentity(recorded.base_weights, recorded.base_config)
    if difference := then.difference(now):
        raise UserError(
            f"{trained} was trained on another base than model.path={model.path} is now: "
            f"{difference}. {fix}"
        )
