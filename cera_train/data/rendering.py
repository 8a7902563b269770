"""A chat -> its answers as the chat template renders them. Nothing here imports torch."""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.messages import REASONING
from cera_train.data.rows import Row
from cera_train.data.templates import ChatTemplate, Exchange, Refusal


class Chat(NamedTuple):
    """Messages up to the last supervised answer. A prompt and its completion are two."""

    messages: list[Row]
    given: list[int]  # the indices of the answers that are not empty
    supervised: list[int]  # of those to learn
    tools: list[Any] | None = None  # that they may call
    settings: Row | None = None
    """The row's own settings of the chat template."""


def fitting(chat: Chat, templates: Sequence[ChatTemplate]) -> ChatTemplate:
    """The first template that renders all of a chat.

    Args:
        templates: the same, with different forms of a message.

    Raises:
        UserError: the template refuses the messages, or leaves out or repeats a part of them.
    """
    marks = Placeholders()
    marked = [marks.message(message) for message in chat.messages]
    shape = json.dumps([marked, chat.given, chat.supervised, chat.tools])
    faults = []
    for template in templates:
        fault = dropped_part(shape, template)
        if fault is None:
            return template
        faults.append(fault)
    left_out = (fault for fault in faults if not isinstance(fault, Refusal))
    raise UserError(str(next(left_out, faults[0])))


def exchanges_of(chat: Chat, template: ChatTemplate) -> list[list[Exchange]]:
    """The supervised answers in as few sequences as the template allows: two share one if the
    prompt of the second begins with the prompt and the text of the first. A template may render
    earlier turns anew, such as without their reasoning."""
    sequences: list[list[Exchange]] = []
    rendered = ""  # up to the last answer
    for number in chat.supervised:
        before = chat.messages[:number]
        whole = template.answer(before, chat.messages[number], chat.tools)
        no_answer = f"messages[{number}]: the chat template renders no answer. {FIX}"
        require(bool(whole.answer), no_answer)
        is_next = bool(sequences) and whole.prompt.startswith(rendered)
        if not is_next:
            sequences.append([])
        new = whole.prompt.removeprefix(rendered) if is_next else whole.prompt
        sequences[-1].append(whole._replace(prompt=new))
        rendered = whole.prompt + whole.answer
    return sequences


# --- what a template leaves out -------------------------------------------------------------------

FIX = "Use a model whose template renders it, write it into another turn, or remove it."

FIX_OF_REASONING = "Write it into the content, as <think>...</think>, or remove it."


@functools.lru_cache(maxsize=4096)
def dropped_part(shape: str, template: ChatTemplate) -> UserError | None:
    """What the template leaves out of a chat of this shape, or writes twice. Many templates ignore
    tools, developers or reasoning.

    Args:
        shape: the chat as JSON, with a mark in place of each text. Chats of one shape are rendered
            once.
    """
    try:
        check_renders_all(Chat(*json.loads(shape)), template)
    except UserError as fault:
        return fault
    return None


def check_renders_all(chat: Chat, template: ChatTemplate) -> None:
    """Raises UserError unless the template renders every mark of the chat, and an answer once."""
    sequences = exchanges_of(chat, template)
    rendered = "".join(exchange.prompt + exchange.answer for exchange in sequences[-1])
    answers = [exchange.answer for sequence in sequences for exchange in sequence]
    for tool in chat.tools or []:
        name = str(tool["function"].get("name", ""))
        check_rendered("column 'tools'", name, sequences[0][0].prompt)
    for number, message in enumerate(chat.messages):
        place = f"messages[{number}], of role {message['role']!r},"
        is_answer = number in chat.supervised
        text = answers[chat.supervised.index(number)] if is_answer else rendered
        *thoughts, content = message["content"].split("</think>")
        thought = message.get(REASONING[0], "".join(thoughts).removeprefix("<think>"))
        if is_answer or message["role"] != "assistant":  # earlier answers may be shortened
            check_rendered(place, content, text)
        if content.strip():
            count = sum(answer.count(content.strip()) for answer in answers)
            fix = "Use a model with another template."
            require(count <= is_answer, f"{place} would be supervised {count} times. {fix}")
        for call in message.get("tool_calls", []):
            check_rendered(place, call["function"]["name"], text)
            is_python = str({ARGUMENT: MARK}) in text
            require(not is_python, f"{place} has arguments that the template writes as Python.")
        if is_answer:
            check_rendered(f"the reasoning of {place}", thought, text, FIX_OF_REASONING)


def check_rendered(what: str, mark: str, rendered: str, fix: str = FIX) -> None:
    is_there = mark.strip() in rendered
    require(is_there, f"{what} is left out by this model's chat template. {fix}")


MARK = "mark"  # of an argument: how many a call has does not matter
ARGUMENT = "city"


class Placeholders:
    """Copies of messages in which a mark stands for each text: equal copies have the same shape.
    Tools and names stand for themselves."""

    def __init__(self) -> None:
        self.count = 0

    def text(self) -> str:
        self.count += 1
        return f"mark{self.count:05}"

    def message(self, message: Row) -> Row:
        marked: Row = {"role": message["role"], "content": ""}
        if message["content"].strip():
            marked["content"] = self.text()
        if "</think>" in message["content"]:
            marked["content"] = f"<think>\n{self.text()}\n</think>\n\n{marked['content']}"
        thought = self.text() if message.get("reasoning_content") else None
        marked |= {key: thought for key in REASONING if key in message}
        marked |= {key: message[key] for key in ("name", "tool_call_id") if key in message}
        if "tool_calls" in message:
            marked["tool_calls"] = [self.call(call) for call in message["tool_calls"]]
        return marked

    def call(self, call: Row) -> Row:
        return call | {"function": call["function"] | {"arguments": {ARGUMENT: MARK}}}
