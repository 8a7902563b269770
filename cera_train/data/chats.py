"""A row -> a chat, whatever its layout; and its plain text. Nothing here imports a tokenizer, nor
torch."""

import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from cera_train.common.errors import UserError, errors_as
from cera_train.common.settings import require
from cera_train.data.messages import TURNS, messages_of, own_settings, tools_of
from cera_train.data.rendering import Chat
from cera_train.data.rows import PROMPT, Row, as_text, kind_of, text_of
from cera_train.data.templates import Exchange
from cera_train.settings.data import (
    COLUMN_TEMPLATES,
    DataConfig,
    Layout,
    LossOn,
    Turns,
    Writing,
)

ASKS = ("user", "tool")
"""Roles whose messages the assistant answers. What it says before any of them is context."""

WRITTEN = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
"""Roles as they appear in plain text."""


# --- a row as a chat ------------------------------------------------------------------------------


def chat_of(row: Row, config: DataConfig, is_templated: bool, side: int = 0) -> Chat | None:
    """A row of any layout as a chat; None where no answer is supervised.

    Args:
        is_templated: a chat template writes it.
        side: of a preference, 0 for the chosen answer, 1 for the rejected one.
    """
    extras = (tools_of(row), own_settings(row)) if is_templated else ()
    if config.layout not in TURNS:
        pair = pair_of(row, config, is_templated, side)
        if pair is None:
            return None
        # A template needs no spaces around the texts.
        prompt, answer = (text.strip() if is_templated else text for text in pair)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Chat(messages, [1], [1], *extras)
    turns = config.turns
    if config.is_paired:
        row = row | {str(config.layout): turns_of_side(row, ("chosen", config.rejected)[side])}
        turns = Turns.last
    messages = messages_of(row, config.layout)
    given, supervised = answers_of(messages, config, turns)
    is_published = config.layout == Layout.conversations and config.turns == Turns.first
    if supervised and is_published and not is_templated:
        messages = published(messages)
        given, supervised = answers_of(messages, config, turns)
    if not supervised:
        return None
    return Chat(messages[: supervised[-1] + 1], given, supervised, *extras)


def turns_of_side(row: Row, side: str) -> list[Row]:
    """The turns up to one answer of a preference: those of its column, after a list `prompt`."""
    before = row.get("prompt")
    turns = row.get(side)
    require(
        isinstance(turns, list),
        f"column {side!r} holds {kind_of(turns)}: expected a list of messages.",
    )
    return [*before, *turns] if isinstance(before, list) else turns


def uses_template(config: DataConfig, tokenizer: Any) -> bool:
    """Whether the chat template writes rows of this layout. Raises UserError where it should and
    the tokenizer has none."""
    if not may_use_template(config):
        return False
    is_needed = config.chat == Writing.template or config.layout == Layout.messages
    if is_needed and not tokenizer.chat_template:
        place = "data.layout=messages" if config.chat == Writing.auto else "data.chat=template"
        raise UserError(
            f"{place} needs a tokenizer with a chat template, and this model's has none: use an "
            "instruction-tuned model, or data.chat=plain."
        )
    return bool(tokenizer.chat_template)


def may_use_template(config: DataConfig) -> bool:
    """Whether a chat template writes rows of this layout, if the tokenizer has one."""
    is_chat = config.layout in (Layout.messages, Layout.conversations, Layout.instruction)
    return config.chat == Writing.template or (config.chat == Writing.auto and is_chat)


def answers_of(
    messages: Sequence[Row], config: DataConfig, wanted: Turns
) -> tuple[list[int], list[int]]:
    """The indices of the answers after the first question, and of those that are supervised: those
    wanted, without those marked `train: false` or `weight: 0`."""
    question = first_question(messages)
    given = []
    for number, message in enumerate(messages):
        is_answer = number > question and message["role"] == "assistant"
        if is_answer and (message["content"].strip() or message.get("tool_calls")):
            given.append(number)
    trained = [
        number for number in given if _is_trained(messages[number], f"{config.layout}[{number}]")
    ]
    require(
        config.loss_on != LossOn.all or trained == given,
        "data.loss_on=all counts every answer, and one has weight 0: set data.loss_on=completion.",
    )
    match wanted:
        case Turns.first:
            return given, trained[:1]
        case Turns.last:
            return given, trained[-1:]
    return given, trained


def first_question(messages: Sequence[Row]) -> int:
    """The index of the first message that asks; 0 without one. A system prompt may precede it."""
    return next((number for number, each in enumerate(messages) if each["role"] in ASKS), 0)


def _is_trained(message: Row, place: str) -> bool:
    flag = message.get("train", message.get("weight"))
    expected = "expected train: true or false, or weight: 1 or 0."
    require(flag in (None, 0, 1), f"{place} has the flag {str(flag)[:60]!r}: {expected}")
    return flag != 0


# --- plain text -----------------------------------------------------------------------------------


def published(messages: Sequence[Row]) -> list[Row]:
    """The first question and the first answer, without the system prompt, as the paper takes
    them."""
    asked = messages[first_question(messages) :]

    def first(role: str) -> Row:
        empty = {"role": role, "content": ""}
        return next((message for message in asked if message["role"] == role), empty)

    return [first("user"), first("assistant")]


def plain_exchanges(chat: Chat) -> list[Exchange]:
    """`User: ...` and `Assistant: ...`."""
    exchanges = []
    context = ""
    for number, message in enumerate(chat.messages):
        role = message["role"]
        fix = "needs a chat template: set data.chat=template, and a model that has one."
        require(role != "tool" and not message.get("tool_calls"), f"a call of a tool {fix}")
        if number in chat.given:
            answer = f" {message['content']}"
            exchanges.append(Exchange(f"{context}Assistant:", answer, number in chat.supervised))
            context = "\n"
        else:
            context += f"{WRITTEN[role]}: {message['content']}\n"
    return exchanges


def unmarked_exchanges(chat: Chat) -> list[Exchange]:
    """The texts without markup: equal under every model."""
    exchanges = []
    context = ""
    for number, message in enumerate(chat.messages):
        if number in chat.given:
            exchanges.append(Exchange(context, message["content"], number in chat.supervised))
            context = ""
        else:
            context += message["content"]
    return exchanges


def up_to_supervised(exchanges: Sequence[Exchange]) -> list[list[Exchange]]:
    """For each supervised exchange, those up to it."""
    numbered = enumerate(exchanges, 1)
    return [[*exchanges[:number]] for number, exchange in numbered if exchange.supervised]


def prompt_of(exchanges: Sequence[Exchange]) -> str:
    """The text up to the last answer."""
    *before, last = exchanges
    return "".join(each.prompt + each.answer for each in before) + last.prompt


def key_text(exchanges: Sequence[Exchange]) -> str:
    """The text by which rows with one prompt are found: that before the first supervised answer; of
    a document, which asks nothing, all of it."""
    [asked, *_] = up_to_supervised(exchanges)
    return prompt_of(asked) or exchanges[0].answer


# --- a row as a prompt and its answer -------------------------------------------------------------


def pair_of(row: Row, config: DataConfig, is_templated: bool, side: int) -> tuple[str, str] | None:
    """The prompt and the answer of a row of a layout without turns; None without an answer.

    Args:
        is_templated: a chat template marks the prompt, instead of words around it.
        side: of a preference, 0 for the chosen answer, 1 for the rejected one.
    """
    if config.layout == Layout.instruction:
        return instruction(row, is_templated)
    prompt, completion = templates_of(config)
    if side == 1:
        return templates(prompt, config.rejected, "data.rejected")(row)
    return templates(prompt, completion)(row)


def templates_of(config: DataConfig) -> tuple[str, str]:
    """The templates of layout text, of documents, and of computed rows."""
    if config.layout == Layout.documents:
        return "", "{text}"
    return COLUMN_TEMPLATES if config.is_computed else (config.prompt, config.completion)


@functools.lru_cache
def templates(
    prompt: str, completion: str, setting: str = "data.completion"
) -> Callable[[Row], tuple[str, str] | None]:
    """What reads rows of layout `text`: columns in templates. Without a prompt a row is a
    document."""
    prompt_columns = columns_of(prompt, "data.prompt")
    answer_columns = columns_of(completion, setting)
    setting_of = dict.fromkeys([*prompt_columns, *answer_columns], setting)
    setting_of |= dict.fromkeys(prompt_columns, "data.prompt")
    fix = "write one in braces, such as {answer}."
    require(bool(answer_columns), f"{setting}={completion!r} names no column: {fix}")

    def pair(row: Row) -> tuple[str, str] | None:
        values = {name: text_of(row, name, setting) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answer_columns):
            return None
        return prompt.format_map(values), completion.format_map(values)

    return pair


def instruction(row: Row, is_templated: bool) -> tuple[str, str] | None:
    """Layout `instruction`: Alpaca's columns; `input` may be empty or missing."""
    asked = text_of(row, "instruction")
    context = as_text(row.get("input"), "column 'input'")
    answer = text_of(row, "output")
    question = f"{asked}\n{context}" if context else asked
    if not answer.strip():
        return None
    return (question, answer) if is_templated else (PROMPT.format(question=question), f" {answer}")


def columns_read(config: DataConfig) -> tuple[list[str], list[str]]:
    """The columns of the question and those of the answer, for a layout without turns."""
    if config.layout == Layout.instruction:
        return ["instruction"], ["output"]
    prompt, completion = templates_of(config)
    question = list(dict.fromkeys(columns_of(prompt, "data.prompt")))
    return question, columns_of(completion, "data.completion")


def columns_of(template: str, setting: str = "template") -> list[str]:
    """The columns that a setting's template names. A template that does more is refused: `{a.b}`,
    `{a[0]}`, `{a:>9}`."""
    with errors_as(f"{setting}={template!r} is malformed", "Write a literal brace twice."):
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            reason = f"{{{name}}} is not just the name of a column. Write a literal brace twice."
            raise UserError(f"{setting}={template!r}: {reason}")
    return [name for _, name, _, _ in fields]
