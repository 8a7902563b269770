"""Settings of `cera-chat` and `cera-export`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from cera_train.common.settings import require, section, setting
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import GenerationConfig, SubjectConfig
from cera_train.settings.values import NamedValues


@dataclass
class ChatConfig(SubjectConfig):
    prompt: str | None = setting(None, "answers")
    """One question. null: read stdin, or hold a conversation in a terminal."""
    template_settings: NamedValues = setting(None, "answers")
    """Values of the chat template's own variables, such as {enable_thinking: false}; they win over
    those that the run was trained with."""
    max_new_tokens: PositiveInt = setting(512, "answers")
    generation: GenerationConfig = section()
    """A question gets one answer, the first of generation.samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template_settings = self.template_settings or {}


ExportForm = StrEnum("ExportForm", ["lora", "merged", "gguf"])
Weights = StrEnum("Weights", ["base", "bfloat16", "float32"])


@dataclass
class ExportConfig(SubjectConfig):
    to: ExportForm = setting(ExportForm.lora, "result")
    """lora: the nearest LoRA, in PEFT's format: of the same rank as a CeRA, of another method with
    99.9 % of each matrix's squared change; merged: a plain model, with the adapter, or that LoRA of
    a CeRA, in its weights; gguf: that model for llama.cpp."""
    weights: Weights = setting(Weights.base, "result")
    """Precision of a merged model or a GGUF. base: that of the run."""
    check: str | None = setting(None, "nothing")
    """A folder, or a GGUF file, that was made of this run, here or by another program. It is
    compared with the run, and nothing is exported."""
    output: str | None = setting(None, "nothing")
    """A new folder, or an earlier export, which is replaced. null: RUN/export_FORM, and
    export_FORM-best for the best adapter."""
    at_most: NonNegativeFloat | None = setting(None, "nothing")
    """Nats per token: a folder is refused with status 3 if the 95 % interval of its KL divergence
    from the run exceeds this. null: what rounding explains, three times what it changes in the
    run itself, and 0.01 more for a LoRA of another method. What is quantised needs a number."""
    rows: PositiveInt | None = setting(None, "result")
    """Held-out rows to judge on. null: all."""
    data: DataConfig | None = section(None)
    """null: the run's rows."""

    def __post_init__(self) -> None:
        require(
            self.run not in (None, "base"),
            "run=... is missing: the folder of a finished run.",
        )
        super().__post_init__()
        is_folder = self.check is not None and Path(self.check).suffix != ".gguf"
        require(
            self.server is None or is_folder,
            f"server={self.server} serves a folder, which is compared with the run: set "
            f"check=RUN/adapter or another.",
        )
