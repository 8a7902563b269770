"""Settings of `cera-chat` and `cera-export`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, section, setting
from cera_train.settings.data import DataConfig, template_settings
from cera_train.settings.evaluation import AnsweringConfig, GenerationConfig, SubjectConfig
from cera_train.settings.model import ModelConfig, Quantization

Template = StrEnum("Template", ["auto", "chat", "none"])


@dataclass
class ChatConfig(AnsweringConfig):
    compare: str | None = setting(None, "nothing")
    """A second run, adapter or base, which answers the same questions."""
    prompt: str | None = setting(None, "answers")
    """One question. null: read stdin, or hold a conversation in a terminal."""
    prompts: str | None = setting(None, "answers")
    """A file of questions: one a line, or rows with the columns of the template (jsonl, json,
    parquet)."""
    template: Template = setting(Template.auto, "answers")
    """chat: the tokenizer's chat template; none: the text as it is; auto: as in the rows that the
    run was trained on; without a run, chat if the tokenizer has a template, else none."""
    template_settings: Any = setting(None, "answers")
    """Values of the chat template's own variables, such as {enable_thinking: false}; they win over
    those that the run was trained with."""
    max_new_tokens: int = setting(512, "answers")
    generation: GenerationConfig = section()
    """A question gets one answer, the first of generation.samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_place("compare", self.compare)
        require_positive("", self, "max_new_tokens")
        self.template_settings = template_settings("template_settings", self.template_settings)
        require(
            self.prompt is None or self.prompts is None,
            f"prompt={self.prompt!r} and prompts={self.prompts} exclude each other: leave one out.",
        )
        require(
            self.prompt is None or bool(self.prompt.strip()),
            "prompt='' is empty: write a question.",
        )


ExportFormat = StrEnum("ExportFormat", ["lora", "merged"])


@dataclass
class ExportConfig(SubjectConfig):
    format: ExportFormat = setting(ExportFormat.lora, "result")
    """lora: a LoRA of the same rank, in PEFT's format; merged: that LoRA in the base's weights, a
    plain model."""
    output: str | None = setting(None, "nothing")
    """A new folder, or an earlier export, which is replaced. null: RUN/export_FORMAT."""
    tolerance: float = setting(0.01, "nothing")
    """Nats per token: nothing is exported if the 95 % interval of the change in loss exceeds
    this."""
    calibration_tokens: int = setting(4096, "result")
    """The linear maps are fitted to training rows with up to this many tokens."""
    rows: int | None = setting(None, "result")
    """Held-out rows to judge on. null: all."""
    data: DataConfig | None = section(None)
    """null: the run's rows."""

    def __post_init__(self) -> None:
        require_positive("", self, "calibration_tokens", "rows")
        require(self.tolerance >= 0, f"tolerance={self.tolerance} must not be negative.")
        require(
            self.run not in (None, "base"),
            "run=... is missing: the folder of a finished run with a CeRA adapter.",
        )

    def check_base(self, model: ModelConfig) -> None:
        """Raises UserError for a base into which no weights can be merged."""
        require(
            self.format == ExportFormat.lora or model.quantization == Quantization.none,
            f"format=merged: the base is quantised (model.quantization={model.quantization}), and "
            f"merging would round "
            "the adapter away. Set format=lora, or a model= without quantisation.",
        )
