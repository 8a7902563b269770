"""Settings of the rows, and how they become tokens."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.settings import MISSING, Changes, leaves, require, require_positive, section, setting

Layout = StrEnum("Layout", ["text", "conversations", "messages", "logistic_map", "reasoning_gym"])
Turns = StrEnum("Turns", ["first", "all"])
LossOn = StrEnum("LossOn", ["completion", "all"])
BatchLayout = StrEnum("BatchLayout", ["auto", "flat", "padded"])

COMPUTED = (Layout.logistic_map, Layout.reasoning_gym)
"""Layouts whose rows are computed. A row holds `prompt` and `completion`."""

GENERATORS = {
    "algebra": ("simple_equations", "complex_arithmetic"),
    "arithmetic": (
        *("chain_sum", "basic_arithmetic", "products", "decimal_chain_sum", "fraction_simplification", "leg_counting"),
    ),
    "number theory": ("gcd", "lcm", "prime_factorization", "count_bits", "base_conversion"),
    "algorithms": ("spell_backward", "letter_counting", "word_sorting", "caesar_cipher", "binary_alternation"),
    "logic": ("syllogism", "knights_knaves", "aiw"),
}
"""Generators of reasoning-gym by subject: their rows follow from the seed and their graders read an answer as text.
Others are left out: some of their graders run it as Python, and isomorphic_strings differs between processes."""


def several(value: Any) -> list[Any]:
    """The values of a setting that takes one or a list."""
    return value if isinstance(value, list) else [value]


def check_growths(key: str, growths: Any) -> None:
    """Raises UserError for a growth r at which x' = r x (1 - x) leaves [0, 1], or that a prompt cannot show."""
    numbers = several(growths)
    is_growth = [type(growth) in (int, float) and 0 < growth <= 4 for growth in numbers]
    require(bool(numbers) and all(is_growth), f"{key}={growths} must be numbers above 0 and up to 4.")
    if any(float(f"{growth:g}") != growth for growth in numbers):
        raise UserError(f"{key}={growths} has more than the six digits that a prompt shows: round it.")
    require(len(set(numbers)) == len(numbers), f"{key}={growths} names one twice: leave it out.")


@dataclass
class LogisticMapConfig:
    """Rows of the logistic map x' = growth x (1 - x), for `data.layout=logistic_map`."""

    growth: Any = setting(3.5, "result")
    """A number, or a list of them: each has a row from every starting point."""
    steps: int = setting(6, "result")
    decimals: int = setting(2, "result")
    """Starting points are all numbers between 0 and 1 with this many decimals."""
    seed: int = setting(0, "result")
    """Decides which starting points train and which validate."""

    def __post_init__(self) -> None:
        require_positive("data.logistic_map", self, "steps", "decimals")
        check_growths("data.logistic_map.growth", self.growth)
        require(self.decimals <= 4, f"data.logistic_map.decimals={self.decimals} must be at most 4.")

    @property
    def growths(self) -> list[float]:
        return several(self.growth)


@dataclass
class ReasoningGymConfig:
    """Rows of generators of reasoning-gym, for `data.layout=reasoning_gym`."""

    generator: Any = setting("chain_sum", "result")
    """A generator's name, or a list of them, which write a row in turn."""
    level: int | None = setting(None, "result")
    """Difficulty, by the generator's curriculum, from 0. null: the generator's defaults."""
    seed: int = setting(0, "result")
    """Draws the questions. Which split a question belongs to follows from its text."""

    def __post_init__(self) -> None:
        check_generators("data.reasoning_gym.generator", self.generator)
        require(self.level is None or self.level >= 0, f"data.reasoning_gym.level={self.level} must not be negative.")
        require(0 <= self.seed < 1000, f"data.reasoning_gym.seed={self.seed} must be between 0 and 999.")

    @property
    def generators(self) -> list[str]:
        return several(self.generator)


def check_generators(key: str, generators: Any) -> None:
    """Raises UserError for a name that is not in `GENERATORS`."""
    known = [name for names in GENERATORS.values() for name in names]
    names = several(generators)
    require(bool(names), f"{key}=[] names none: choose from {', '.join(known)}.")
    for name in names:
        near = difflib.get_close_matches(str(name), known, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Choose from {', '.join(known)}."
        require(name in known, f"{key}={name} is no generator of reasoning-gym that is tested here. {hint}")
        require(names.count(name) == 1, f"{key} names {name} twice: keep one.")


@dataclass
class DataFacts:
    """Size of a data set: with it cera-plan needs neither the rows nor a tokenizer."""

    of: str | None = setting(None, "nothing")
    """The `data.path` that these facts describe."""
    train_rows: int = setting(MISSING, "nothing")
    """Rows of the split that data.train_split names, before it is sliced."""
    eval_rows: int = setting(MISSING, "nothing")
    tokens_per_row: float = setting(MISSING, "nothing")
    """Mean, truncated at the file's max_length."""
    supervised: float = setting(MISSING, "nothing")
    """Share of the tokens that belong to completions, end token included."""
    estimated: bool = setting(False, "nothing")
    """Whether tokens_per_row and supervised are estimates; a comment in the file gives their basis."""

    def __post_init__(self) -> None:
        require_positive("data.facts", self, "train_rows", "eval_rows", "tokens_per_row", "supervised")
        require(self.supervised <= 1, f"data.facts.supervised={self.supervised} is a share: it must be at most 1.")


@dataclass
class MixPart:
    """One data set of `data.mix`. What it leaves null it takes from `data`."""

    weight: float | None = setting(None, "result", splits="training")
    """Its share of the training rows, relative to the other parts. null in all parts: every row of each part once."""
    path: str | None = setting(None, "result")
    subset: str | None = setting(None, "result")
    revision: str | None = setting(None, "result")
    train_split: str | None = setting(None, "result", splits="training")
    eval_split: str | None = setting(None, "result")
    files: list[str] | None = setting(None, "result")
    """Local files to train on. Without eval_files, their last eval_rows rows are held out."""
    eval_files: list[str] | None = setting(None, "result")
    rows: int | None = setting(None, "result", splits="training")
    """Takes only this many training rows, from the start."""
    eval_rows: int | None = setting(None, "result")
    """0: this part evaluates nothing."""
    layout: Layout | None = setting(None, "tokens")
    prompt: str | None = setting(None, "tokens")
    completion: str | None = setting(None, "tokens")
    turns: Turns | None = setting(None, "tokens")
    loss_on: LossOn | None = setting(None, "tokens")


@dataclass
class DataConfig:
    layout: Layout = setting(Layout.text, "tokens")
    """How a row reads. text: columns by template; conversations: ShareGPT's from/value; messages: chat template;
    logistic_map and reasoning_gym compute their rows."""
    path: str | None = setting(None, "result")
    """A data set's id on the Hub. Not needed with train_files."""
    subset: str | None = setting(None, "result")
    revision: str | None = setting(None, "result")
    train_split: str = setting("train", "result", splits="training")
    eval_split: str = setting("test", "result")
    """Splits in the notation of `datasets`: `train[:100000]`."""
    train_files: list[str] = setting(list, "result")
    eval_files: list[str] = setting(list, "result")
    """jsonl, json, csv or parquet files, here or elsewhere (s3://...). Without eval_files, the last eval_rows rows
    of train_files are held out."""
    prompt: str | None = setting(None, "tokens")
    completion: str | None = setting(None, "tokens")
    """Templates of layout text, with {column} for a row's columns. The completion starts where the prompt ends."""
    turns: Turns = setting(Turns.first, "tokens")
    """Turns of layout conversations. first: the first question and answer, as published; all: every turn and the system
    prompt."""
    loss_on: LossOn = setting(LossOn.completion, "tokens")
    max_length: int = setting(512, "tokens")
    """Tokens; longer rows are truncated."""
    streaming: bool = setting(False, "result")
    """Read the training rows once and in order while the run trains, and keep no tokens: for more rows than fit a disk.
    Needs train.max_updates. Without eval_files, the first eval_rows rows of train_files are held out."""
    shuffle_buffer: int = setting(10_000, "result", splits="training")
    """Rows of a stream that are shuffled at a time."""
    train_rows: int | None = setting(None, "result", splits="training")
    eval_rows: int | None = setting(None, "result")
    """Take only this many rows, from the start. null: all. With a mix, train_rows are the rows of an epoch in all, and
    eval_rows those of each part."""
    mix: list[MixPart] | None = setting(None, "result")
    """Trains on several data sets, in place of path and train_files."""
    mix_seed: int = setting(0, "result", splits="training")
    """Draws the rows of a part that does not train whole."""
    allow_overlap: bool = setting(False, "result", splits="training")
    """Accept evaluation rows whose prompt is also a training row's."""
    logistic_map: LogisticMapConfig = section(LogisticMapConfig)
    reasoning_gym: ReasoningGymConfig = section(ReasoningGymConfig)
    facts: DataFacts | None = section(None)
    """For cera-plan only."""

    def __post_init__(self) -> None:
        require_positive("data", self, "max_length", "train_rows", "shuffle_buffer")
        require(self.eval_rows is None or self.eval_rows >= 0, f"data.eval_rows={self.eval_rows} must not be negative.")
        if self.streaming:
            require(self.mix is None, "data.streaming=true reads one data set: leave out data.mix.")
            require(not self.is_computed, f"data.layout={self.layout} computes its rows: leave out data.streaming.")
            require(bool(self.eval_files or self.eval_rows), "data.streaming=true needs data.eval_rows, such as 1000.")
        if self.mix is None:
            self._check_rows()
        else:
            self._check_mix()

    def _check_rows(self) -> None:
        if self.layout == Layout.text and not (self.prompt and self.completion):
            example = "$'data.prompt=\"Question: {question}\\nAnswer:\"' $'data.completion=\" {answer}\"'"
            raise UserError(f"data.layout=text needs data.prompt and data.completion, such as {example}.")
        if self.is_computed:
            require(self.eval_rows is not None, f"data.layout={self.layout} needs data.eval_rows, such as 20.")
            is_endless = self.layout == Layout.reasoning_gym
            mend = f"data.layout={self.layout} needs data.train_rows, such as 1000."
            require(not is_endless or self.train_rows is not None, mend)
        elif not (self.path or self.train_files):
            mend = "set data.train_files to local files or data.path to a Hub data set"
            raise UserError(f"there is no training data: {mend}.")
        if self.train_files and not self.eval_files and self.eval_rows is None:
            mend = "name evaluation files, or set data.eval_rows to hold out the last rows of the training files"
            raise UserError(f"data.train_files without data.eval_files: {mend}.")
        if self.eval_files and not self.train_files:
            raise UserError("data.eval_files without data.train_files: name the training files too.")

    def _check_mix(self) -> None:
        require(bool(self.mix), "data.mix=[] has no parts: name some, such as [{files:[a.jsonl],weight:1}], or null.")
        for name in ("path", "train_files", "eval_files"):
            value = getattr(self, name)
            require(not value, f"data.{name}={value} beside data.mix: name it in a part, or leave out one of the two.")
        weights = [part.weight for part in self.mix]
        for number, part in enumerate(self.mix):
            place, weight, is_named = f"data.mix.{number}", part.weight, bool(part.path or part.files)
            if weight is None:
                mend = "give every part a weight, or none"
                require(set(weights) == {None}, f"{place}.weight is missing, and other parts have weights: {mend}.")
            else:
                is_weight = math.isfinite(weight) and weight >= 0
                require(is_weight, f"{place}.weight={weight} must be a number of at least 0.")
            if not is_named and part.layout not in COMPUTED:
                raise UserError(f"{place} has neither path nor files: name local files or a Hub data set.")
            if is_named and (layout := part.layout or self.layout) in COMPUTED:
                mend = f"choose another data=NAME, such as data=jsonl, or set {place}.layout"
                raise UserError(f"{place} names rows, but data.layout={layout} computes them: {mend}.")
        require(None in weights or sum(weights) > 0, "data.mix: the weights add up to 0. Raise one.")
        self.check_evaluates()

    def check_evaluates(self) -> None:
        """Raises UserError where no rows are left to evaluate on."""
        keys = [f"{place}.eval_rows=0" for place, part in self.parts() if part.eval_rows == 0]
        require(len(keys) < len(self.mix or [self]), f"{', '.join(keys)}: no rows to evaluate on. Raise one.")

    def parts(self) -> Iterator[tuple[str, "DataConfig"]]:
        """The data sets of a mix, each after its key; without a mix, these settings themselves after `data`."""
        if self.mix is None:
            yield "data", self
        for number, part in enumerate(self.mix or ()):
            values = {field.name: getattr(part, field.name) for field in fields(part) if field.name != "weight"}
            values = {ALONE.get(name, name): value for name, value in values.items() if value is not None}
            with at_part(f"data.mix.{number}"):
                config = replace(self, mix=None, **{"train_rows": None} | values)
            yield f"data.mix.{number}", config

    @property
    def weights(self) -> list[float | None]:
        """The weight of each of `parts`."""
        return [None] if self.mix is None else [part.weight for part in self.mix]

    @property
    def is_computed(self) -> bool:
        """Whether the rows are computed, not read."""
        return self.mix is None and self.layout in COMPUTED

    @property
    def title(self) -> str:
        """Where the rows come from, for people."""
        if self.mix is not None:
            return " + ".join(part.title for _, part in self.parts())
        if self.layout == Layout.reasoning_gym:
            return f"reasoning_gym ({', '.join(self.reasoning_gym.generators)})"
        return ", ".join(Path(name).name for name in self.train_files) or self.path or str(self.layout)


ALONE = {"files": "train_files", "rows": "train_rows"}
"""Settings of a part that `data` calls otherwise."""


@contextlib.contextmanager
def at_part(place: str) -> Iterator[None]:
    """Lets UserErrors name settings as they stand in a part: data.mix.0.files for data.train_files."""
    try:
        yield
    except UserError as error:
        if place == "data":
            raise
        names = {ALONE.get(field.name, field.name): field.name for field in fields(MixPart)}
        pattern = rf"\bdata\.({'|'.join(names)})\b"
        raise UserError(re.sub(pattern, lambda key: f"{place}.{names[key[1]]}", str(error))) from error


def evaluation_rows(settings: dict[str, Any], prefix: str = "data.") -> tuple:
    """The settings that choose the evaluation tokens of a perplexity. Runs are comparable where these are equal.

    Args:
        settings: flat settings of a run or an evaluation, in which data's start with `prefix`. A null counts like a
            missing key, since another version may not have it.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    parts = {part[0] for key in settings if (part := re.match(rf"{re.escape(prefix)}mix\.\d+\.", key))}
    evaluating = [part for part in parts if settings.get(f"{part}eval_rows") != 0]
    if len(evaluating) == 1:  # the rows of a run on this part alone
        fields_of_part = {field.name: evaluating[0] + field.name for field in fields(MixPart) if field.name != "weight"}
        of_part = {
            f"{prefix}{ALONE.get(name, name)}": settings[key] for name, key in fields_of_part.items() if key in settings
        }
        settings = {key: value for key, value in settings.items() if not key.startswith(f"{prefix}mix.")} | of_part
    skipped = _training_keys(DataConfig, "train_files", prefix, settings)
    for part in parts:
        skipped |= _training_keys(MixPart, "files", part, settings)
    return tuple(sorted((key, repr(value)) for key, value in settings.items() if key not in skipped))


def _training_keys(schema: type, files: str, prefix: str, settings: dict[str, Any]) -> set[str]:
    """The keys of a data set that do not choose its evaluation rows. `files` names the training files."""
    marked = [(leaf.key, leaf.field.metadata["splits"], leaf.changes) for leaf in leaves(schema)]
    skipped = [key for key, splits, changes in marked if splits == "training" or changes == Changes.nothing]
    if settings.get(prefix + files):  # nothing comes from the Hub
        skipped += ["path", "subset", "revision", "eval_split"]
    if settings.get(f"{prefix}eval_files"):
        skipped += [files]
    if schema is MixPart and settings.get(f"{prefix}eval_rows") == 0:
        skipped = [key for key, *_ in marked]
    return {prefix + key for key in skipped}
