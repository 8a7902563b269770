"""A base model is its files: the tensors of its weights, and what its config.json says of the
architecture. How a run loads them does not enter: neither precision and quantisation, nor the
version of transformers."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cera_train.common.files import read_json, sampled_digest
from cera_train.common.settings import flatten
from cera_train.model.folder import files_of
from cera_train.settings.model import ModelConfig

NOT_OF_THE_ARCHITECTURE = re.compile(
    r"(.*\.)?(_.*|\w*token_ids?|(torch_)?dtype|transformers_version|use_cache|auto_map|architectures"
    r"|initializer_range|output_\w+|return_dict|(quantization_config|id2label|label2id)(\..*)?)"
)
"""Keys of a config.json that say how a model is begun, stored, loaded or asked."""


class BaseIdentity(NamedTuple):
    """What tells a base model from any other."""

    weights: str | None
    """A digest of the weight files; None for pickles, and where they are on a server's disk."""
    config: dict[str, Any] | None
    """config.json, as it is; None likewise."""

    def difference(self, now: BaseIdentity) -> str:
        """What differs from the base of a run, in words; empty if nothing does."""
        before = architecture(self.config or now.config or {})
        after = architecture(now.config or self.config or {})
        words = [
            f"{key} was {before.get(key)}, is {after.get(key)}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if None not in (self.weights, now.weights) and self.weights != now.weights:
            words.insert(0, "other weights")
        return "; ".join(words)


def identity_of(model: ModelConfig) -> BaseIdentity:
    """The identity of the files that `model.path` names, in a folder or the Hub's local cache."""
    folder = Path(files_of(model.path))
    if not folder.is_dir():
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    config = folder / "config.json"
    files = weight_files(folder)
    weights = sampled_digest(files) if files else None
    return BaseIdentity(weights, read_json(config) if config.is_file() else None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; empty where one is missing, as after an
    interrupted download."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        names = {*read_json(index)["weight_map"].values()}
    files = [folder / name for name in names]
    return files if all(file.is_file() for file in files) else []


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the architecture, by dotted keys. This transformers fills in its
    defaults, so that files of two versions of it compare."""
    with contextlib.suppress(Exception):  # such as for a model whose code comes with it
        config = AutoConfig.for_model(**config).to_dict()
    return {
        key: value
        for key, value in flatten(config).items()
        if value is not None and not NOT_OF_THE_ARCHITECTURE.fullmatch(key)
    }
