"""A row of turns -> messages, as a chat template takes them, and the tools they may call. Nothing
here imports torch."""

import json
from typing import Any

from cera_train.common.errors import UserError, errors_as
from cera_train.common.settings import require
from cera_train.data.rows import Row, as_text, cell_of, kind_of
from cera_train.settings.data import Layout

ROLES = ("user", "assistant", "system", "tool", "developer")

SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}
"""Speakers of layout `conversations`, and their roles."""

TURNS = {
    Layout.messages: ("role", "content", ROLES),
    Layout.conversations: ("from", "value", (*SHAREGPT, *ROLES)),
}
"""For each layout, the keys of a turn's speaker and text, and the speakers."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what a model thinks before it answers."""

TOOLS = "expected a list of objects with function.name"  # the shape of tools and calls


def messages_of(row: Row, layout: str) -> list[Row]:
    """The turns of a row as messages: role, content, which may be empty, tool_calls with arguments
    as objects, reasoning_content. Nulls go, which a template would print as None: a table fills
    with them the keys that only other rows have.

    Raises:
        UserError: a turn is not one, or holds what a language model cannot read.
    """
    messages = [
        _message_of(turn, layout, f"{layout}[{number}]")
        for number, turn in enumerate(turns_of(row, layout))
    ]
    if layout == Layout.conversations and row.get("system"):
        messages.insert(0, {"role": "system", "content": as_text(row["system"], "column 'system'")})
    return messages


def turns_of(row: Row, layout: str) -> list[Any]:
    """The turns of a row: those of its column, or of `prompt` and `completion`. Raises UserError
    where it has none of these."""
    if layout == Layout.messages and is_continued(row):
        context = [
            turn | {"train": False} if isinstance(turn, dict) else turn for turn in row["prompt"]
        ]
        return [*context, *row["completion"]]
    column = str(layout)
    others = [str(each) for each in TURNS if row.get(str(each))]
    turns = cell_of(row, column, f" Set data.layout={(others or ['auto'])[0]}.") or []
    require(
        isinstance(turns, list),
        f"column {column!r} holds {kind_of(turns)}: expected a list of turns.",
    )
    return turns


def is_continued(row: Row) -> bool:
    """Whether a row has the messages of a chat in two columns, as TRL's: `prompt`, whose answers
    are context, and `completion`."""
    parts = row.get("prompt"), row.get("completion")
    return row.get("messages") is None and all(isinstance(part, list) for part in parts)


def _message_of(turn: Any, layout: str, place: str) -> Row:
    speaker, text, known = TURNS[layout]
    is_turn = isinstance(turn, dict) and turn.get(speaker) in known
    if not is_turn or not (text in turn or turn.get("tool_calls")):
        expected = f"expected an object with {speaker} (one of {', '.join(known)}) and {text}"
        fix = "Fix it, or remove the turn"
        if layout == Layout.messages and isinstance(turn, dict) and "from" in turn:
            fix = "Rename the column to conversations, and set data.layout=conversations"
        raise UserError(f"{place} is {str(turn)[:60]!r}: {expected}. {fix}.")
    message = _without_nulls(turn) | {
        "content": text_of_content(turn.get(text), f"{place} {text!r}")
    }
    if layout == Layout.conversations:
        message["role"] = SHAREGPT.get(turn[speaker], turn[speaker])
        del message[speaker], message[text]
        if turn[speaker] == "function_call":
            call = _parsed(message["content"], place)
            message |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    if "tool_calls" in message:
        message["tool_calls"] = _calls_of(message["tool_calls"], place)
    thoughts = [message[key] for key in REASONING if message.get(key)]
    if thoughts:
        thought = as_text(thoughts[0], f"{place} {REASONING[0]!r}")
        message |= {"reasoning_content": thought, "thinking": thought}
    return message


def text_of_content(content: Any, cell: str) -> str:
    """The text of a message: a text, or OpenAI's list of parts."""
    if not isinstance(content, list):
        return as_text(content, cell)
    texts = []
    for part in content:
        kind = str(part.get("type")) if isinstance(part, dict) else kind_of(part)
        fix = "expected text: remove it, or write what it shows."
        require(kind == "text", f"{cell} holds a part of type {kind!r}: {fix}")
        texts.append(as_text(part.get("text"), cell))
    return "".join(texts)


def _calls_of(calls: Any, place: str) -> list[Row]:
    another_shape = f"{place} has tool_calls of another shape: {TOOLS}."
    require(isinstance(calls, list), another_shape)
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        is_call = isinstance(function, dict) and isinstance(function.get("name"), str)
        require(is_call, another_shape)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{place}, the arguments of {function['name']!r},")
        function = {"name": function["name"], "arguments": arguments}
        parsed.append({"type": "function"} | call | {"function": function})
    return parsed


def _parsed(text: str, place: str) -> Row:
    """The object that a text writes as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    fix = "expected a JSON object."
    require(
        isinstance(value, dict), f"{place} holds {text[:60]!r}: {fix} Fix it, or remove the row."
    )
    return value


def tools_of(row: Row) -> list[Row] | None:
    """The tools that a row's column `tools` describes to the model: a list, or a list as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with errors_as("column 'tools' holds broken JSON", "Write a list of tools."):
            tools = json.loads(tools.strip() or "null")
    tools = _without_nulls(tools) or []
    are_tools = isinstance(tools, list) and all(map(_is_tool, tools))
    require(are_tools, f"column 'tools' is {str(tools)[:60]!r}: {TOOLS}.")
    wrapped = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return wrapped or None


def _is_tool(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function", tool), dict)


def own_settings(row: Row) -> Row:
    """The row's settings of the chat template."""
    settings = _without_nulls(row.get("chat_template_kwargs")) or {}
    require(
        isinstance(settings, dict),
        f"column 'chat_template_kwargs' holds {kind_of(settings)}: expected an object.",
    )
    return settings


def _without_nulls(value: Any) -> Any:
    """A copy of nested dicts and lists without the keys that hold null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
