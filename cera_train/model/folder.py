"""A model's folder, checked before anything of it is loaded: its config, tokenizer and weights are there and whole.
Nothing here imports torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError, words_of
from cera_train.common.settings import require

PYPI = "pypi:"
"""Start of a `model.path` that names a package of PyPI's."""

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    *("sentencepiece.bpe.model", "tiktoken.model", "vocab.model", "qwen.tiktoken"),
)
"""Files by which transformers recognises a tokenizer."""

INDEX = "model.safetensors.index.json"


def check_model(path: str, needs_weights: bool = True) -> None:
    """Refuses a `model.path` that is neither a usable folder nor looks like a Hub id. Reads only the heads of files."""
    if path.startswith(PYPI):
        return
    place, folder = place_of_model(path), Path(path)
    require(bool(path.strip()) and "\0" not in path, f"{place}: not a name: write a Hub id or a folder.")
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"{place}: cannot read it: {error.strerror}.") from error
    if folder.is_dir():
        _check_folder(folder, place, needs_weights)
    elif not exists:
        _check_hub_id(path, place)
    elif folder.suffix == ".gguf":
        raise UserError(
            f"{place}: GGUF files are not trained on: set model.path to the model's folder or Hub id with safetensors "
            "weights, from which the GGUF file was made."
        )
    else:
        raise UserError(f"{place}: it is a file: set model.path to the folder that it is in, {folder.parent}.")


def place_of_model(path: str) -> str:
    """The setting and its value as a message names them: a very long value is cut."""
    return f"model.path={path if len(path) <= 200 else f'{path[:100]}...'}"


def _check_hub_id(path: str, place: str) -> None:
    """Refuses a path that cannot be a Hub id: those have at most one slash."""
    require("://" not in path, f"{place}: not an address: write the Hub id alone, such as HuggingFaceTB/SmolLM2-135M.")
    if path.startswith("~"):
        raise UserError(f"{place}: folder does not exist; a ~ is not expanded here: write {Path(path).expanduser()}.")
    is_path = path.startswith((".", "/"))
    looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and "--" not in path and ".." not in path
    require(
        bool(looks_like_id) and not is_path,
        f"{place}: folder does not exist (from {Path.cwd()})"
        f"{'' if is_path else ', and a Hub id looks like organisation/name'}. Set model.path to a local folder with "
        "config.json, or to a Hub id.",
    )


def _check_folder(folder: Path, place: str, needs_weights: bool) -> None:
    """Refuses a model's folder that lacks a file, or in which one is cut off."""
    try:
        files = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{place}: cannot read the folder: {error.strerror}.") from error
    require(bool(files), f"{place}: the folder is empty: put config.json, the tokenizer and the weights into it.")
    if "config.json" not in files:
        raise UserError(f"{place}: the folder has no config.json. {_mend_of_other_folder(folder, files)}")
    config = read_object(folder / "config.json", place)
    require(
        bool(config.get("model_type") or config.get("auto_map")),
        f"{folder / 'config.json'}: it has no model_type ({place}): copy the model's own config.json, or add a line "
        'such as "model_type": "llama".',
    )
    others = sorted(files & {"tokenizer_config.json", "generation_config.json"})
    objects = {name: read_object(folder / name, place) for name in others}
    require(
        bool(files.intersection(TOKENIZERS) or objects.get("tokenizer_config.json", {}).get("auto_map")),
        f"{place}: the folder has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model into it, or "
        "save one with tokenizer.save_pretrained(folder).",
    )
    if needs_weights:
        _check_weights(folder, files, place)


def _mend_of_other_folder(folder: Path, files: set[str]) -> str:
    """How to get from a folder of another kind to a model."""
    if "adapter_config.json" in files:
        base = read_object(folder / "adapter_config.json", str(folder)).get("base_model_name_or_path")
        return f"It is an adapter: set model.path to its base model{f', {base}' if base else ''}."
    if "config.yaml" in files:
        return "It looks like a run's folder: set model.path to the model that the run trained on."
    if any(name.endswith(".gguf") for name in files):
        return "It holds GGUF, which is not trained on: use the model with safetensors weights."
    if models := sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]):
        return f"Did you mean {models[-1].parent}?"
    return "Copy the model's config.json into it, or name another folder."


def read_object(path: Path, place: str) -> dict[str, Any]:
    """A JSON file of a model that holds an object."""
    try:
        value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        reason = f"broken JSON: {error.msg}" if path.stat().st_size else "the file is empty"
        raise UserError(f"{path}:{error.lineno}: {reason} ({place}). Download or copy the file again.") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = words_of(error)
        raise UserError(f"{path}: cannot read the file: {reason} ({place}). Download or copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__} ({place}). Copy the file again.")
    return value


def _check_weights(folder: Path, files: set[str], place: str) -> None:
    """Refuses weights of which a file is missing or cut off. Other formats are left to transformers."""
    from safetensors import SafetensorError, safe_open

    shards = {"model.safetensors"} & files
    if not shards and INDEX in files:
        weight_map = read_object(folder / INDEX, place).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{folder / INDEX}: it has no weight_map ({place}). Download or copy it again.")
        shards = set(weight_map.values())
    for name in sorted(shards):
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            reason = words_of(error)
            if "header too large" in reason and (folder / name).stat().st_size < 1000:
                reason = "it is a Git LFS pointer, not the weights: run git lfs pull"
            raise UserError(f"{folder / name}: {reason} ({place}). Download or copy it again.") from error
