"""Settings of what comes after training: `cera-chat` and `cera-export`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import require, require_positive, section, setting
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import ModelConfig, Quantization


class Template(StrEnum):
    auto = "auto"
    run = "run"
    chat = "chat"
    none = "none"


@dataclass
class ChatConfig:
    run: str | None = setting(None, "nothing")
    """A run's folder, an adapter's folder, or `base` for the untouched model."""
    compare: str | None = setting(None, "nothing")
    """A second one, which answers the same questions."""
    prompt: str | None = setting(None, "answers")
    """One question. null: from stdin, or a conversation in a terminal."""
    prompts: str | None = setting(None, "answers")
    """A file of questions: a line each, or rows with the columns of the template (jsonl, json, parquet)."""
    template: Template = setting(Template.auto, "answers")
    """run: the rows that the run was trained on; chat: the tokenizer's chat template; none: the text as it is. auto:
    run, or without a run chat where the tokenizer has one, else none."""
    max_new_tokens: int = setting(512, "answers")
    generation: GenerationConfig = section()
    """A question gets one answer, the first of generation.samples."""
    model: ModelConfig | None = section(None)
    """null: the run's."""
    output_dir: str = setting("outputs", "nothing")
    trust_remote_code: bool = setting(False, "nothing")
    """Runs Python code that comes with the model of a run or an adapter."""

    def __post_init__(self) -> None:
        require_positive("", self, "max_new_tokens")
        require(self.run is not None, "run=... is missing: the folder of a run or of an adapter, or base.")
        for key, place in (("run", self.run), ("compare", self.compare)):
            require(
                place != "base" or self.model is not None,
                f"{key}=base needs model.path=FOLDER, or model=NAME, such as model=smollm2_135m_pypi.",
            )
        require(
            self.prompt is None or self.prompts is None,
            f"prompt={self.prompt!r} and prompts={self.prompts} exclude each other: leave one out.",
        )
        require(self.prompt is None or bool(self.prompt.strip()), "prompt='' is empty: write a question.")


class ExportFormat(StrEnum):
    lora = "lora"
    merged = "merged"


@dataclass
class ExportConfig:
    run: str | None = setting(None, "nothing")
    """The folder of a finished run with a CeRA adapter, or of such an adapter."""
    format: ExportFormat = setting(ExportFormat.lora, "result")
    """lora: a LoRA of the same rank, in PEFT's format; merged: that LoRA in the base's weights, a plain model."""
    output: str | None = setting(None, "nothing")
    """A new folder, or an earlier export, which is replaced. null: RUN/export_FORMAT."""
    tolerance: float = setting(0.01, "nothing")
    """Nats a token: nothing is exported where the 95 % interval of the change of the loss reaches above this."""
    calibration_tokens: int = setting(4096, "result")
    """Training rows that the linear maps are fitted to, up to so many tokens."""
    rows: int | None = setting(None, "result")
    """Held-out rows to judge on. null: all."""
    data: DataConfig | None = section(None)
    """null: the run's rows."""
    model: ModelConfig | None = section(None)
    """null: the run's."""
    output_dir: str = setting("outputs", "nothing")
    trust_remote_code: bool = setting(False, "nothing")
    """Runs Python code that comes with the model of a run or an adapter."""

    def __post_init__(self) -> None:
        require_positive("", self, "calibration_tokens", "rows")
        require(self.tolerance >= 0, f"tolerance={self.tolerance} must not be negative.")
        require(self.run not in (None, "base"), "run=... is missing: the folder of a finished run with a CeRA adapter.")

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError for a base that weights cannot be merged into."""
        require(
            self.format == ExportFormat.lora or model.quantization == Quantization.none,
            f"format=merged: the base is quantised (model.quantization={model.quantization}), and merging would round "
            "the adapter away. Set format=lora, or a model= without quantisation.",
        )
