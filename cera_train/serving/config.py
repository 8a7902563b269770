"""Settings of a chat: what `cera-chat` does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cera_train.common.settings import require, require_positive, section, setting
from cera_train.evaluation.config import GenerationConfig
from cera_train.model.config import ModelConfig


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
                f"{key}=base needs model=..., such as model=smollm2_135m_pypi.",
            )
        require(
            self.prompt is None or self.prompts is None,
            f"prompt={self.prompt!r} and prompts={self.prompts} exclude each other: leave one out.",
        )
        require(self.prompt is None or bool(self.prompt.strip()), "prompt='' is empty: write a question.")
