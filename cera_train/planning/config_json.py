"""A model's config.json: from its folder, the Hub's cache on this disk, or conf/model. Never from a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from cera_train.common.errors import UserError
from cera_train.common.files import cache_dir, config_dir
from cera_train.model.config import ModelConfig


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The config of `model.path`.

    Raises:
        UserError: there is none on this disk, it is broken, or transformers does not know its type.
    """
    try:
        if (source := _source(model)) is not None:
            # trust_remote_code: a plan runs no code that comes with a model.
            return AutoConfig.from_pretrained(
                source, revision=model.revision, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        is_local = Path(source).is_dir()
        if is_local or not isinstance(error, OSError):
            place = f"{source}/config.json" if is_local else f"model.path={model.path}"
            reason = " ".join(str(error).split("\n")[0].split())
            raise UserError(f"{place} cannot be used: {reason}") from error
    facts = model.facts
    if facts is not None and facts.of == model.path and facts.config is not None:
        return AutoConfig.for_model(**json.loads((config_dir("conf") / "model" / facts.config).read_text()))
    raise UserError(
        f"model.path={model.path}: its config.json is not on this disk. Get it with `hf download {model.path} "
        "config.json`, or set model.path to a local folder that has one."
    )


def _source(model: ModelConfig) -> str | None:
    """What transformers reads the config from; None for a PyPI package that was not converted yet."""
    if not model.path.startswith("pypi:"):
        return model.path
    module = model.path.removeprefix("pypi:").replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    folder = cache_dir() / "models" / files[0].stem if files else None
    return str(folder) if folder is not None and (folder / "config.json").is_file() else None
