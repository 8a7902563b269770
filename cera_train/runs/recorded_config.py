"""The config.yaml of a run or an evaluation, as dataclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_yaml
from cera_train.common.trust import escape_interpolations
from cera_train.config import Config

RETIRED = {
    f"model.facts.{name}"
    for name in (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "vocab_size", "tie_word_embeddings", "max_position_embeddings"),
        *("attention_bias", "mlp_bias"),
    )
}
"""Settings of earlier versions that changed no result: left out when an old config is read."""


def load_config(path: Path, schema: type = Config) -> Any:
    """A config as it stands in a run's folder, which was resolved when it was written: a `${` in it is text.

    Raises:
        UserError: the file is missing, broken, or of another version.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = escape_interpolations(_without_retired(read_yaml(path)))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except OmegaConfBaseException as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}.") from error


def _without_retired(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {name: value for name, value in tree.items() if prefix + str(name) not in RETIRED}
    return {
        name: _without_retired(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in kept.items()
    }
