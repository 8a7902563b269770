"""A row -> examples to learn from, or questions to ask: the one place that writes prompts.

    row -> chat -> exchanges of text -> ids

Training learns `examples`; held-out tasks and GRPO ask `questions`; cera-chat sends a `prompt`.
Nothing here imports torch."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cera_train.common.errors import errors_at
from cera_train.common.settings import Changes, changes_of, require, to_plain
from cera_train.data.chats import (
    chat_of,
    columns_read,
    key_text,
    plain_exchanges,
    prompt_of,
    unmarked_exchanges,
    up_to_supervised,
    uses_template,
)
from cera_train.data.messages import TURNS, messages_of
from cera_train.data.rendering import Chat, exchanges_of, fitting
from cera_train.data.rows import PlacedRow, Row
from cera_train.data.templates import ChatTemplate, Exchange, open_templates
from cera_train.data.tokens import digest_of_parts, ids_of_pieces, start_ids, words_of
from cera_train.settings.data import DataConfig, Layout, LossOn, Turns

CACHE_VERSION = 7  # raised when a new version tokenises or stores the same rows differently

ANSWER = "?"  # stands for an answer that a row lacks


@dataclass
class Example:
    """Token ids of a sequence, and whether the prediction of each counts in the loss. The first
    token is never predicted."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_key: str = ""
    """A digest of the text before the first supervised token: equal prompts have equal keys."""
    has_answer: bool = True
    """Whether a token of an answer is left, even if the loss is on all tokens. A row without one is
    dropped."""
    truncated: bool = False
    continues: bool = False
    """Whether it holds more answers of the row of the example before."""

    def columns(self) -> dict[str, Any]:
        return vars(self) | {"length": len(self.input_ids), "supervised": sum(self.loss_mask)}


class Question(NamedTuple):
    """What a row asks, as inference shows it to the model."""

    place: str  # of the row
    prompt_ids: tuple[int, ...]
    prompt: str
    """The same as text."""
    text: str
    """The prompt without the markup of a chat template: the same under every template."""
    gold: str
    """The text of the row's answer, without markup and without reasoning beside it."""
    is_chat: bool
    """Whether a chat template wrote the prompt."""


class Reader:
    """Reads the rows of one data set for one model.

    Args:
        config: with layout and template settings decided; one part of a mix.
        chosen_only: of preferences, reads the chosen answer alone.

    Raises:
        UserError: the tokenizer has no end token, or no chat template where it needs one.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, chosen_only: bool = False) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.is_chat = uses_template(config, tokenizer)
        self.sides = 1 if chosen_only else config.sequences
        # A chat template writes the start token itself, and may write an end token.
        self.start = [] if self.is_chat else start_ids(tokenizer)
        self.end = tokenizer.eos_token_id
        require(
            self.end is not None,
            f"model.path={tokenizer.name_or_path}: the tokenizer has no end-of-text token: set "
            "eos_token in its tokenizer_config.json.",
        )
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token for token, text in added if text.special}

    def examples(self, rows: Iterable[PlacedRow]) -> list[Example]:
        """The sequences of rows, as few of each as the template allows; of a preference the chosen
        and the rejected one, of a long document several; an empty one for a row without an answer.
        Many rows cost one call of the tokenizer, which has threads."""
        written = []
        for place, row in rows:
            with errors_at(place):
                written.append(self.sequences(row))
        ids = iter(self._ids_of(itertools.chain.from_iterable(written)))
        return [each for sequences in written for each in self._examples_of(sequences, ids)]

    def questions(self, place: str, row: Row) -> list[Question]:
        """What inference is asked, for each supervised answer; of a preference for the chosen one;
        except by a prompt longer than max_length. Empty for a document, which asks nothing."""
        with errors_at(place):
            chat = chat_of(row, self.config, self.is_chat)
            if chat is None:
                return []
            prompts = self._prompts(chat)
            texts = list(map(prompt_of, prompts))
            if self.is_chat:
                plain = chat_of(row, self.config, is_templated=False) or chat
                texts = map(prompt_of, up_to_supervised(unmarked_exchanges(plain)))
        return [
            Question(
                place,
                ids,
                prompt_of(prompt),
                text,
                chat.messages[number]["content"].strip(),
                self.is_chat,
            )
            for prompt, text, number in zip(prompts, texts, chat.supervised, strict=True)
            if prompt_of(prompt) and len(ids := self._prompt_ids(prompt)) <= self.config.max_length
        ]

    def prompt(self, row: Row) -> tuple[int, ...]:
        """The ids that ask what the last turn of a row without an answer asks. Raises UserError
        where it asks nothing, lacks a column or has another layout."""
        layout = self.config.layout
        config = replace(self.config, turns=Turns.last)
        if layout not in TURNS:
            _, answer = columns_read(config)
            answered = row | dict.fromkeys(answer, ANSWER)
        else:
            messages = messages_of(row, layout)
            answer = {"role": "assistant", "content": ANSWER}
            answered = row | {"messages": [*messages, answer]}
            config = replace(config, layout=Layout.messages)
        chat = chat_of(answered, config, self.is_chat)
        asks_nothing = f"column {str(layout)!r} asks nothing: write a question."
        require(chat is not None, asks_nothing)
        [prompt] = self._prompts(chat)
        return self._prompt_ids(prompt)

    def digest(self, fingerprint: str) -> str:
        """The digest of all that the tokens of a source follow from, by its fingerprint."""
        config = self.config
        settings = {
            key: value
            for key, value in to_plain(config).items()
            if changes_of(DataConfig, key) == Changes.tokens and key != "rejected"
        }
        if self.sides > 1:
            settings["rejected"] = config.rejected
        elif config.is_paired and config.layout in TURNS:  # else data.completion names the column
            settings["chosen_only"] = True
        if config.layout in TURNS and config.loss_on == LossOn.all:
            settings["left_out"] = True  # as 0.2.0, whose cache stays
        vocabulary, special = words_of(self.tokenizer)
        template = self.tokenizer.chat_template
        return digest_of_parts(CACHE_VERSION, settings, vocabulary, template, special, fingerprint)

    # --- a row as text ----------------------------------------------------------------------------

    def sequences(self, row: Row) -> list[list[Exchange]]:
        """The exchanges of each sequence of a row."""
        sides = []
        for side in range(self.sides):
            chat = chat_of(row, self.config, self.is_chat, side)
            sides.append([] if chat is None else self._written(chat))
        if self.sides > 1:
            check_preference(*sides)
        return [*itertools.chain.from_iterable(sides)]

    def _written(self, chat: Chat) -> list[list[Exchange]]:
        if self.is_chat:
            return exchanges_of(chat, self._template(chat))
        write = plain_exchanges if self.config.layout in TURNS else unmarked_exchanges
        return [write(chat)]

    def _prompts(self, chat: Chat) -> list[list[Exchange]]:
        """What inference shows the model: exchanges, the last of which it has to answer."""
        if not self.is_chat:
            return up_to_supervised(*self._written(chat))
        template = self._template(chat)
        befores = [chat.messages[:number] for number in chat.supervised]
        texts = [template.render(before, chat.tools, is_prompt=True) for before in befores]
        return [[Exchange(text, "")] for text in texts]

    def _template(self, chat: Chat) -> ChatTemplate:
        """The template in the form that renders all of a chat."""
        settings = self.config.template_settings
        return fitting(chat, open_templates(self.tokenizer, chat.tools, settings, chat.settings))

    # --- text as tokens ---------------------------------------------------------------------------

    def _ids_of(self, sequences: Iterable[Sequence[Exchange]]) -> list[list[int]]:
        """The ids of every prompt and every answer, one after the other."""
        pieces = []
        for exchanges in sequences:
            for number, exchange in enumerate(exchanges):
                pieces.append((exchange.prompt, number > 0))
                pieces.append((exchange.answer, number > 0 or bool(exchange.prompt)))
        return ids_of_pieces(pieces, self.tokenizer)

    def _ended(self, answer: list[int]) -> list[int]:
        """An answer, supervised or context, with its end token."""
        is_ended = self.is_chat and bool(answer) and answer[-1] in self.special
        return answer if is_ended else [*answer, self.end]

    def _prompt_ids(self, exchanges: Sequence[Exchange]) -> tuple[int, ...]:
        """The ids up to the answer of the last exchange."""
        ids = [*self.start]
        for number, piece in enumerate(self._ids_of([exchanges])[:-1]):
            is_answer = number % 2 == 1
            ids += self._ended(piece) if is_answer else piece
        return tuple(ids)

    def _examples_of(
        self, sequences: Sequence[Sequence[Exchange]], ids: Iterator[list[int]]
    ) -> list[Example]:
        """The examples of a row.

        Args:
            ids: those of its prompts and answers come next.
        """
        if not sequences:
            return [Example([], [], has_answer=False)]
        is_paired = self.sides > 1
        examples = []
        for number, exchanges in enumerate(sequences):
            continues = number > 0 and not is_paired
            examples += self._windows(exchanges, ids, continues)
        if is_paired:  # a preference that lacks an answer is dropped as a whole
            is_whole = all(example.has_answer for example in examples)
            examples = [replace(example, has_answer=is_whole) for example in examples]
        return examples

    def _windows(
        self, exchanges: Sequence[Exchange], ids: Iterator[list[int]], continues: bool
    ) -> Iterator[Example]:
        """A sequence within max_length; a longer document as several."""
        input_ids: list[int] = []
        supervised: list[bool] = []
        for exchange in exchanges:
            prompt = next(ids)
            answer = self._ended(next(ids))
            input_ids += prompt + answer
            supervised += [False] * len(prompt) + [exchange.supervised] * len(answer)
        key = hashlib.blake2b(key_text(exchanges).encode(), digest_size=16).hexdigest()
        step = self.config.max_length - len(self.start)
        is_document = self.config.layout == Layout.documents
        firsts: Iterable[int] = [0]
        if is_document:
            # Without a start token, nothing comes before a single last token.
            predicted = len(input_ids) if self.start else len(input_ids) - 1
            firsts = range(0, max(1, predicted), step)
        for first in firsts:
            kept = slice(first, first + step)
            mask = [False] * len(self.start) + supervised[kept]
            has_answer = any(mask[1:])
            if self.config.loss_on == LossOn.all:
                mask = [True] * len(mask)
            mask[0] = False
            yield Example(
                self.start + input_ids[kept],
                mask,
                f"{key}{first or ''}",
                has_answer,
                len(input_ids) > step and not is_document,
                continues,
            )


def check_preference(chosen: list[list[Exchange]], rejected: list[list[Exchange]]) -> None:
    """Raises UserError if there is nothing to prefer."""
    for side, sequences in (("chosen", chosen), ("rejected", rejected)):
        require(bool(sequences), f"the {side} answer is empty: write one, or remove the row.")
    sides = "the chosen and the rejected answer"
    require(
        key_text(chosen[0]) == key_text(rejected[0]),
        f"{sides} follow different prompts: pair answers to one prompt.",
    )
    require(chosen != rejected, f"{sides} are equal: remove the row.")
