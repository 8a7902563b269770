"""Rows of turns: layout `conversations` (ShareGPT's from and value) and layout `messages` (role and content, by the
tokenizer's chat template)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import jinja2

from cera_train.common.errors import UserError
from cera_train.data.rows import Row, Segment, as_text, kind_of, list_of

SPEAKERS = {"system": "System", "human": "User", "gpt": "Assistant"}
"""The speakers of layout `conversations`, and how they are written."""

ROLES = ("system", "user", "assistant", "tool", "developer")
"""The roles of layout `messages`."""

OTHER_WORDS = {"user": "human", "assistant": "gpt", "human": "user", "gpt": "assistant", "bot": "assistant"} | {
    "model": "assistant",
    "chatgpt": "gpt",
    "function": "tool",
}
"""Names of speakers in other data sets, and what to write instead."""


# --- which layout it is ----------------------------------------------------------------------------------------------


def layout_of(row: Any) -> str | None:
    """The mend for rows of turns that stand under another layout; None where a row has no turns."""
    for name in ("messages", "conversations"):
        turns = row.get(name) if isinstance(row, dict) else None
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            layout = "conversations" if "from" in turns[0] else "messages" if "role" in turns[0] else None
            if layout:
                rename = "" if layout == name else f"Rename column {name!r} to {layout!r} and set"
                return f"{rename or 'Set'} data.layout={layout}."
    return None


def turns_in(row: Row, name: str) -> list[Row]:
    """The turns of a row, each an object.

    Raises:
        UserError: the row has no such column, or turns of the other layout.
    """
    mend = layout_of(row)
    if not isinstance(row, dict) or name not in row:
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else kind_of(row)
        mend = mend or "Set data.layout=text with data.prompt and data.completion, or rename the column."
        raise UserError(f"column {name!r} is missing (data.layout={name}); its columns are {columns or 'none'}. {mend}")
    turns = list_of(row, name)
    for number, turn in enumerate(turns):
        keys = ("from", "value") if name == "conversations" else ("role", "content")
        if not isinstance(turn, dict):
            raise UserError(f"{name}[{number}] is {kind_of(turn)}: expected an object with {keys[0]} and {keys[1]}.")
        if keys[0] not in turn:
            other = f" {mend}" if mend and f"data.layout={name}" not in mend else ""
            there = ", ".join(map(str, turn)) or "nothing"
            raise UserError(f"{name}[{number}] has no {keys[0]!r}: expected {' and '.join(keys)}, got {there}.{other}")
    return turns


def _unknown(name: str, number: int, key: str, value: Any, known: Iterable[str]) -> UserError:
    *first, last = known
    word = value.lower() if isinstance(value, str) else ""
    instead = word if word in known else OTHER_WORDS.get(word)
    mend = f" Write {instead!r} for {value!r}." if instead in known else " Rename it, or remove the turn."
    return UserError(f"{name}[{number}] has {key} {value!r}: expected {', '.join(first)} or {last}.{mend}")


# --- conversations ---------------------------------------------------------------------------------------------------


def first_turns(row: Row) -> list[Segment]:
    """Layout `conversations` as published: the first question and the first answer, without the system prompt."""
    turns = list(speeches(row))
    human = next((text for speaker, text in turns if speaker == "human"), "")
    answer = next((text for speaker, text in turns if speaker == "gpt"), "")
    if not answer.strip():
        return []
    return [Segment(f"User: {human}\nAssistant:", False), Segment(f" {answer}", True)]


def all_turns(row: Row) -> list[Segment]:
    """Layout `conversations` whole: the system prompt and every turn, every answer supervised."""
    segments, context = [], ""
    for speaker, text in speeches(row):
        if speaker == "gpt" and text.strip():
            segments += [Segment(f"{context}Assistant:", False), Segment(f" {text}", True)]
            context = "\n"
        else:
            context += f"{SPEAKERS[speaker]}: {text}\n"
    return segments


def speeches(row: Row) -> Iterable[tuple[str, str]]:
    """Speaker and text of every turn."""
    for number, turn in enumerate(turns_in(row, "conversations")):
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise _unknown("conversations", number, "from", speaker, SPEAKERS)
        if "value" not in turn:
            raise UserError(f"conversations[{number}] has no 'value': write its text, or remove the turn.")
        yield speaker, as_text(turn["value"], f"conversations[{number}] 'value'")


# --- messages --------------------------------------------------------------------------------------------------------


def chat_turns(row: Row, tokenizer: Any) -> list[Segment]:
    """Layout `messages`: the tokenizer's chat template. What an assistant turn adds to the rendered conversation so far
    is supervised, so no marker has to be searched for. Tool calls are part of the turn."""
    messages, tools = messages_of(row), _tools_of(row)
    segments, rendered = [], ""

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error

    for index, message in enumerate(messages):
        # An assistant's opening line answers nothing: like an empty turn it is context.
        calls = message.get("tool_calls") or []
        if message["role"] != "assistant" or index == 0 or not (str(message["content"]).strip() or calls):
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (before.startswith(rendered) and after.startswith(before)):
            raise UserError(
                "the chat template renders earlier turns differently once an answer follows, so answers cannot be "
                "told apart. Keep one assistant turn a row, or use data.layout=text."
            )
        # A template may write a line break after its end token: nobody generates that, it belongs to the next prompt.
        answer = after.removeprefix(before).rstrip()
        if any(_function_name(call) not in answer for call in calls):
            raise UserError(
                f"messages[{index}] has tool_calls, which this model's chat template leaves out: use a model whose "
                "template renders tool calls, or write them into the content."
            )
        segments += [Segment(before.removeprefix(rendered), False), Segment(answer, True)]
        rendered = before + answer
    _check_tool_messages(messages, lambda: render(len(messages), False))
    return segments


def messages_of(row: Row) -> list[Row]:
    """The messages of a row as a chat template takes them: no nulls, and the arguments of tool calls as objects.

    Raises:
        UserError: a message lacks its role or content, or has a role that is not known.
    """
    messages = turns_in(row, "messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: Row, number: int) -> Row:
    role, calls = message["role"], message.get("tool_calls")
    if not isinstance(role, str) or role not in ROLES:
        raise _unknown("messages", number, "role", role, ROLES)
    place = f"messages[{number}] ({role})"
    if calls is not None and not (isinstance(calls, list) and all(map(_function_name, calls))):
        raise UserError(f"{place} has tool_calls of another shape: expected a list of objects with function.name.")
    if calls and role != "assistant":
        raise UserError(f"{place} has tool_calls: only an assistant calls tools.")
    if "content" not in message and not calls:
        there = ", ".join(map(str, message))
        raise UserError(f"{place} has no 'content': expected role and content, got {there}.")
    content = message.get("content")
    if content is None and role != "assistant":
        raise UserError(f'{place} has null content: write its text, or "" if it is empty.')
    as_text(content, f"{place} 'content'")
    if content is not None and not any(value is None for value in message.values()) and not calls:
        return message
    # A template would print null as None; a table's rows hold null for every key that other rows have.
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = "" if content is None else content
    return kept | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _function_name(call: Any) -> str | None:
    """The name of the function that a tool call calls; None where it has none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _call(call: Row) -> Row:
    """A tool call without nulls, its arguments an object: templates write them as JSON, text as a quoted text."""
    call = _without_nulls(call)
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        function["arguments"] = arguments
    return call


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _tools_of(row: Row) -> list[Any] | None:
    """The tools that a row's column `tools` describes to the model, as a list or as JSON of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"column 'tools' holds broken JSON ({error}): write a list of tools.") from error
    if tools and not isinstance(tools, list):
        raise UserError(f"column 'tools' holds {kind_of(tools)}: expected a list of tools.")
    return _without_nulls(tools) or None


def _check_tool_messages(messages: list[Row], render: Any) -> None:
    """Refuses messages that the chat template leaves out: many know neither tools nor a developer."""
    special = [(number, message) for number, message in enumerate(messages) if message["role"] in ("tool", "developer")]
    text = render() if special else ""
    for number, message in special:
        content = str(message["content"]).strip()
        if content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise UserError(
                f"messages[{number}] has role {message['role']!r}, which this model's chat template leaves out: use a "
                "model whose template renders it, or rename the role."
            )
