"""Settings of the rows, and of how they become tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from cera_train.common.errors import errors_at
from cera_train.common.settings import MISSING, require, section, setting
from cera_train.settings.values import Growths, NamedValues, Settings, read_as

Layout = StrEnum(
    "Layout",
    [
        "auto",
        "text",
        "documents",
        "instruction",
        "conversations",
        "messages",
        "logistic_map",
        "dates",
    ],
)
Turns = StrEnum("Turns", ["first", "last", "all"])
Writing = StrEnum("Writing", ["auto", "template", "plain"])
LossOn = StrEnum("LossOn", ["completion", "all"])

COMPUTED = (Layout.logistic_map, Layout.dates)
"""Layouts whose rows are computed. A row holds `prompt` and `completion`."""

COLUMN_TEMPLATES = ("{prompt}", "{completion}")
"""Templates for rows with these two columns, such as computed rows."""


def as_list(value: Any) -> list[Any]:
    """The values of a setting that takes one value or a list."""
    return value if isinstance(value, list) else [value]


@dataclass
class LogisticMapConfig(Settings):
    """Rows of the logistic map x' = growth x (1 - x), for `data.layout=logistic_map`."""

    growth: Growths = setting(3.5, "result")
    """A number, or a list of them: every starting point gives a row for each."""
    decimals: Annotated[int, Field(gt=0, le=4)] = setting(2, "result")
    """Starting points are all numbers between 0 and 1 with this many decimals."""


@dataclass
class DataFacts(Settings):
    """The size of a data set, with which cera-plan needs neither rows nor a tokenizer."""

    of: str | None = setting(None, "nothing")
    """The `data.path` that these facts describe."""
    splits: read_as(dict[str, int]) = setting(dict, "nothing")
    """Rows of each split, by its name."""
    tokens_per_row: float = setting(MISSING, "nothing")
    """Mean, truncated at the file's max_length."""
    supervised: float = setting(MISSING, "nothing")
    """Share of the tokens that belong to completions, end token included."""


@dataclass
class MixPart(Settings):
    """One data set of `data.mix`. Settings that are null come from `data`."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = setting(None, "result")
    """Its share of the training rows, relative to the other parts. null in all parts: every row of
    each part once."""
    path: str | None = setting(None, "result")
    subset: str | None = setting(None, "result")
    train_split: str | None = setting(None, "result")
    eval_split: str | None = setting(None, "result")
    train_files: list[str] | None = setting(None, "result")
    eval_files: list[str] | None = setting(None, "result")
    train_rows: PositiveInt | None = setting(None, "result")
    eval_rows: NonNegativeInt | None = setting(None, "result")
    """0: no row of this part is held out."""
    layout: Layout | None = setting(None, "tokens")
    prompt: str | None = setting(None, "tokens")
    completion: str | None = setting(None, "tokens")


@dataclass
class DataConfig(Settings):
    layout: Layout = setting(Layout.text, "tokens")
    """How a row reads. text: columns by template; documents: the column text, all of it supervised;
    instruction: Alpaca's instruction, input and output; conversations: ShareGPT's from/value;
    messages: OpenAI's role/content; auto: text if data.prompt or data.completion are other
    templates than {prompt} and {completion}, else one of these by the columns of the first rows of
    train_files; for a data set on the Hub text, and messages for preferences. logistic_map and
    dates compute their rows."""
    path: str | None = setting(None, "result")
    """A data set's id on the Hub. Not needed with train_files."""
    subset: str | None = setting(None, "result")
    """Its configuration, such as main of openai/gsm8k."""
    revision: str | None = setting(None, "result")
    """A branch, tag or commit on the Hub. null: the newest commit."""
    train_split: str = setting("train", "result")
    eval_split: str = setting("test", "result")
    """Splits in the notation of `datasets`: `train[:100000]`."""
    train_files: list[str] = setting(list, "result")
    eval_files: list[str] = setting(list, "result")
    """jsonl, json, csv, parquet or txt files. Without eval_files, the last eval_rows rows of
    train_files are held out; without eval_rows too, 5 % of the rows, at most 500, by their
    prompts."""
    prompt: str | None = setting(None, "tokens")
    completion: str | None = setting(None, "tokens")
    """Templates of layout text, with {column} for a row's columns. The completion starts where the
    prompt ends."""
    rejected: str | None = setting(None, "tokens")
    """For preferences: the template of the rejected answer, as `completion` is that of the chosen
    one. With layout messages the column of the rejected conversation; the other is `chosen`, and a
    list `prompt` precedes both."""
    turns: Turns | None = setting(None, "tokens")
    """Answers of a chat that are supervised: the first (as plain text without the system prompt, as
    published), the last, or all. null: the first for conversations, all for messages."""
    chat: Writing = setting(Writing.auto, "tokens")
    """template: rows are messages to the model's chat template, a prompt and its completion too;
    plain: text, as `User: ...` and `Assistant: ...` or by the templates above. auto: the chat
    template if the tokenizer has one, except for layout text."""
    template_settings: NamedValues = setting(None, "tokens")
    """Values of the chat template's own variables, such as {enable_thinking: false};
    {strftime_now: 2026-01-31}, the date that a template writes; {without: "<think>"}, an end of its
    generation prompt that is left out. A row's `chat_template_kwargs` win."""
    loss_on: LossOn = setting(LossOn.completion, "tokens")
    """completion: the loss is on answers; all: on every token but the first."""
    max_length: Annotated[int, Field(gt=1)] = setting(2048, "tokens")
    """Tokens; longer rows are truncated, longer documents become several rows. A first token has no
    loss."""
    streaming: bool = setting(False, "result")
    """Download only as much of a data set on the Hub as train_rows and eval_rows need."""
    train_rows: PositiveInt | None = setting(None, "result")
    eval_rows: NonNegativeInt | None = setting(None, "result")
    """Take only this many rows, from the start. null: all. With a mix, train_rows counts the rows
    of an epoch over all parts, and eval_rows those of each part."""
    mix: list[MixPart] | None = setting(None, "result")
    """Train on several data sets, instead of path and train_files."""
    allow_overlap: bool = setting(False, "result")
    """Accept held-out rows whose prompt is also a training row's."""
    logistic_map: LogisticMapConfig = section(LogisticMapConfig)
    facts: DataFacts | None = section(None)
    """For cera-plan only."""

    def __post_init__(self) -> None:
        self.template_settings = self.template_settings or {}
        if self.mix is None and self.layout != Layout.auto and self.turns is None:
            self.turns = Turns.all if self.layout == Layout.messages else Turns.first
        require(
            not (self.is_paired and self.mix),
            "data.rejected reads one data set: leave out data.mix.",
        )
        has_sides = self.layout in (Layout.auto, Layout.text, Layout.messages)
        require(
            has_sides or not self.is_paired, "data.rejected needs data.layout=text or messages."
        )
        if self.mix is not None:
            self._check_mix()
        elif self.is_computed:
            require(
                not (self.path or self.train_files),
                f"data.layout={self.layout} computes its rows, but others are named: choose "
                "another data=NAME, such as data=jsonl.",
            )
            require(
                self.eval_rows is not None,
                f"data.layout={self.layout} needs data.eval_rows, such as 20.",
            )
        else:
            self._check_sources()

    def _check_sources(self) -> None:
        has_templates = self.layout != Layout.text or (
            self.prompt is not None and bool(self.completion)
        )
        example = (
            "$'data.prompt=\"Question: {question}\\nAnswer:\"' $'data.completion=\" {answer}\"'"
        )
        require(
            has_templates,
            f"data.layout=text needs data.prompt and data.completion, such as {example}.",
        )
        require(
            self.asks or self.chat != Writing.template,
            "data.chat=template writes a question and its answer, and documents ask nothing: leave "
            "it out.",
        )
        fix = "set data.train_files to local files or data.path to a Hub data set."
        require(bool(self.path or self.train_files), f"there is no training data: {fix}")
        is_named = bool(self.train_files) or not self.eval_files
        require(is_named, "data.eval_files without data.train_files: name the training files too.")
        for name in ("train_split", "eval_split"):
            split = getattr(self, name)
            require(
                not (self.streaming and "[" in split),
                f"data.streaming=true reads a split from its start, and data.{name}={split} is a "
                f"part: name a whole split, and set data.{name.removesuffix('_split')}_rows.",
            )

    def _check_mix(self) -> None:
        is_named = self.path or self.train_files or self.eval_files
        require(
            not is_named,
            "data.path or files beside data.mix: name them in a part, or leave out one of the two.",
        )
        weights = [part.weight for part in self.mix if part.weight is not None]
        is_complete = not weights or len(weights) == len(self.mix)
        has_share = not weights or sum(weights) > 0
        fix = "give all parts weights, and one above 0, or none"
        require(is_complete and has_share, f"data.mix has weights {self.weights}: {fix}.")
        # A list, not a generator: every part is checked.
        evaluates = any([part.eval_rows != 0 for _, part in self.parts()])
        require(evaluates, "data.mix holds out no rows: raise an eval_rows.")

    def parts(self) -> Iterator[tuple[str, "DataConfig"]]:
        """The data sets of a mix, each with its key; without a mix, these settings with an empty
        key."""
        if self.mix is None:
            yield "", self
        for number, part in enumerate(self.mix or ()):
            values = {
                name: value
                for name, value in vars(part).items()
                if value is not None and name != "weight"
            }
            with errors_at(f"data.mix.{number}"):
                config = replace(self, mix=None, **{"train_rows": None} | values)
            yield f"data.mix.{number}", config

    @property
    def weights(self) -> list[float | None]:
        """The weight of each part of a mix."""
        return [part.weight for part in self.mix]

    def trained_parts(self) -> Iterator[tuple[str, "DataConfig"]]:
        """The `parts` that give training rows: one of weight 0 only holds rows out."""
        for number, part in enumerate(self.parts()):
            if self.mix is None or self.mix[number].weight != 0:
                yield part

    @property
    def asks(self) -> bool:
        """Whether a row has a prompt: a document has none, nor a text where data.prompt is
        empty."""
        has_none = self.layout == Layout.text and not self.prompt
        return self.layout != Layout.documents and not has_none

    @property
    def is_paired(self) -> bool:
        """Whether a row is a preference: a chosen and a rejected answer."""
        return self.rejected is not None

    @property
    def sequences(self) -> int:
        """Sequences of a row: two for a preference."""
        return 2 if self.is_paired else 1

    @property
    def is_computed(self) -> bool:
        """Whether the rows are computed, not read."""
        return self.mix is None and self.layout in COMPUTED

    @property
    def holds_out_by_prompt(self) -> bool:
        """Whether the held-out rows are a share of the training files'."""
        return bool(self.train_files) and not self.eval_files and self.eval_rows is None

    @property
    def title(self) -> str:
        """Where the rows come from, for display."""
        if self.mix is not None:
            return " + ".join(part.title for _, part in self.parts())
        return (
            ", ".join(Path(name).name for name in self.train_files) or self.path or str(self.layout)
        )
