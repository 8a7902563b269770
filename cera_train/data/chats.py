"""A chat -> its answers, each after what inference would show the model: rendered by the chat
template, or written as plain text. Nothing here imports torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.messages import messages_of, own_settings, tools_of
from cera_train.data.rendering import Chat, Exchange, rendered_sequences
from cera_train.data.rows import Row, kind_of
from cera_train.data.templates import open_templates
from cera_train.settings.data import DataConfig, Layout, LossOn, Turns, Writing

ASKS = ("user", "tool")
"""Roles whose messages the assistant answers. What it says before any of them is context."""

WRITTEN = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
"""Roles as they appear in plain text."""


class Answers(NamedTuple):
    """The indices of the messages that answer."""

    given: list[int]  # every non-empty answer
    supervised: list[int]  # those in the loss
    left_out: list[int]  # those marked `train: false` or `weight: 0`


# --- a row's sequences ----------------------------------------------------------------------------


def chat_exchanges(
    row: Row, config: DataConfig, tokenizer: Any, side: str | None = None, asks: bool = False
) -> list[list[Exchange]]:
    """The answers of a row in as few sequences as the chat template allows. Without a tokenizer,
    the messages' texts, without markup.

    Args:
        side: of a preference, the column of its answer, which may follow a list `prompt`.
        asks: prompts are those of inference, and an answer is its text: for an objective that
            samples answers.
    """
    if side is not None:
        row = row | {str(config.layout): turns_of_side(row, side)}
    messages = messages_of(row, config.layout)
    tools = tools_of(row)
    own = own_settings(row)
    turns = config.turns if side is None else Turns.last
    answers = answers_of(messages, turns, str(config.layout))
    is_templated = uses_template(config, tokenizer)
    is_published = config.layout == Layout.conversations and config.turns == Turns.first
    if answers.supervised and is_published and not is_templated:
        messages = published(messages)
        answers = answers_of(messages, turns, str(config.layout))
    if not answers.supervised:
        return []
    if is_templated:
        *_, last = answers.supervised
        left_out = []
        if config.loss_on == LossOn.all:
            left_out = [number for number in answers.left_out if number < last]
        shown = Chat(messages[: last + 1], tools, tuple(answers.supervised), tuple(left_out))
        templates = open_templates(tokenizer, tools, config.template_settings, own)
        return rendered_sequences(shown, templates, asks)
    write = unmarked_exchanges if tokenizer is None else plain_exchanges
    exchanges = write(messages, answers)
    return asked_apart(exchanges) if asks else [exchanges]


def turns_of_side(row: Row, side: str) -> list[Row]:
    """The turns up to one answer of a preference."""
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
    if tokenizer is None or not may_use_template(config):
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


def answers_of(messages: Sequence[Row], wanted: Turns, layout: str) -> Answers:
    """The answers after the first question, and which of them are supervised: those that
    `data.turns` selects, without those marked `train: false` or `weight: 0`."""
    question = first_question(messages)
    given = []
    for number, message in enumerate(messages):
        is_answer = number > question and message["role"] == "assistant"
        if is_answer and (message["content"].strip() or message.get("tool_calls")):
            given.append(number)
    trained = [number for number in given if _is_trained(messages[number], f"{layout}[{number}]")]
    left_out = [number for number in given if number not in trained]
    match wanted:
        case Turns.first:
            return Answers(given, trained[:1], left_out)
        case Turns.last:
            return Answers(given, trained[-1:], left_out)
    return Answers(given, trained, left_out)


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


def plain_exchanges(messages: Sequence[Row], answers: Answers) -> list[Exchange]:
    """`User: ...` and `Assistant: ...`, up to the last answer that is supervised."""
    exchanges = []
    context = ""
    for number, message in enumerate(messages[: answers.supervised[-1] + 1]):
        role = message["role"]
        fix = "needs a chat template: set data.chat=template, and a model that has one."
        require(role != "tool" and not message.get("tool_calls"), f"a call of a tool {fix}")
        if number in answers.given:
            exchange = Exchange(
                f"{context}Assistant:",
                f" {message['content']}",
                supervised=number in answers.supervised,
                left_out=number in answers.left_out,
            )
            exchanges.append(exchange)
            context = "\n"
        else:
            context += f"{WRITTEN[role]}: {message['content']}\n"
    return exchanges


def asked_apart(exchanges: Sequence[Exchange]) -> list[list[Exchange]]:
    """A sequence for each supervised answer, in which those before it are context."""
    context = [exchange._replace(supervised=False) for exchange in exchanges]
    return [
        [*context[:number], exchange]
        for number, exchange in enumerate(exchanges)
        if exchange.supervised
    ]


def unmarked_exchanges(messages: Sequence[Row], answers: Answers) -> list[Exchange]:
    """The texts up to the last supervised answer, without markup."""
    exchanges = []
    context = ""
    for number, message in enumerate(messages[: answers.supervised[-1] + 1]):
        if number in answers.given:
            is_supervised = number in answers.supervised
            exchanges.append(Exchange(context, message["content"], is_supervised))
            context = ""
        else:
            context += message["content"]
    return exchanges
