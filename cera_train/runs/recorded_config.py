"""The config.yaml of a run or an evaluation, as dataclasses."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.trust import escape_interpolations, redact_tree
from cera_train.settings.run import Config

LENGTH = ("train.epochs", "train.max_updates")
"""The settings that `train.extend` may change."""

AUTO = "auto"
"""Value of a setting that the hardware decides. A folder that records it agrees with every choice."""


def load_config(path: Path, schema: type = Config) -> Any:
    """A config as it stands in a run's folder, which was resolved when it was written: a `${` in it is text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = escape_interpolations(read_yaml(path))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except OmegaConfBaseException as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def differences(path: Path, config: dict[str, Any], schema: type = Config) -> dict[str, str]:
    """The settings that change results and differ between a file and plain values: key -> both values in words."""
    before, now = flatten(redact_tree(to_plain(load_config(path, schema)))), flatten(config)
    return {
        key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) not in (now.get(key), AUTO) and changes_result(key, schema)
    }


@functools.cache
def changes_result(key: str, schema: type = Config) -> bool:
    """Whether a setting changes what is learned or measured, beyond its cost."""
    return changes_of(schema, key) not in (Changes.cost, Changes.nothing)
