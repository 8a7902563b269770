"""A row -> segments of text, some of them supervised: by templates (layout `text`), by ShareGPT's from and value
(`conversations`), or by the tokenizer's chat template (`messages`). Nothing here imports torch."""

import contextlib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2

from cera_train.common.errors import UserError
from cera_train.data.rows import Row, as_text, at, kind_of, text_of
from cera_train.settings.data import DataConfig, Layout, Turns

SPEAKERS = {"system": "System", "human": "User", "gpt": "Assistant"}
"""The speakers of layout `conversations`, and how they are written."""

TURNS = {
    "messages": ("role", "content", ("system", "user", "assistant", "tool", "developer")),
    "conversations": ("from", "value", tuple(SPEAKERS)),
}
"""The keys of a turn by layout, and the values of the first."""


@dataclass
class Segment:
    """A stretch of text. A supervised one ends with the end token."""

    text: str
    supervised: bool

    def __post_init__(self) -> None:
        as_text(self.text, "the text")  # a chat template can show more of a message than its role and content


Segmenter = Callable[[Row], list[Segment]]
"""Makes the segments of a row. An empty list means that the row has no answer."""


def segments_of(rows: Iterable[tuple[str, Row]], to_segments: Segmenter) -> Iterator[list[Segment]]:
    """The segments of each row, given after its place; an error starts with the place."""
    for place, row in rows:
        with at(place):
            segments = to_segments(row)
        yield segments


def segmenter(config: DataConfig, tokenizer: Any) -> Segmenter:
    """The function from a row to its segments. Without a tokenizer, chats lack the marks of a chat template."""
    if config.layout == Layout.text:
        return templates(config.prompt, config.completion)
    if config.is_computed:
        return templates("{prompt}", "{completion}")
    if config.layout == Layout.conversations:
        return first_turns if config.turns == Turns.first else all_turns
    if tokenizer is None:
        return bare_turns
    if not tokenizer.chat_template:
        reason = "data.layout=messages needs a tokenizer with a chat template, and this model's has none"
        raise UserError(f"{reason}: use an instruction-tuned model, or data.layout=text.")
    return partial(chat_turns, tokenizer=tokenizer)


def templates(prompt: str, completion: str) -> Segmenter:
    """Layout `text`: columns in templates."""
    asked, answers = columns_of(prompt, "data.prompt"), columns_of(completion, "data.completion")
    setting_of = dict.fromkeys([*asked, *answers], "data.completion") | dict.fromkeys(asked, "data.prompt")
    if not answers:
        raise UserError(f"data.completion={completion!r} names no column: write one in braces, such as {{answer}}.")

    def segments(row: Row) -> list[Segment]:
        mend = layout_of(row) or "Set data.prompt and data.completion."
        values = {name: text_of(row, name, setting, mend) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answers):
            return []
        return [Segment(prompt.format_map(values), False), Segment(completion.format_map(values), True)]

    return segments


def columns_of(template: str, setting: str = "template") -> list[str]:
    """The columns that the template of a setting names. One that does more is refused: `{a.b}`, `{a[0]}`, `{a:>9}`."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{setting}={template!r} is malformed: {error}. Write a literal brace twice.") from None
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            reason = f"{{{name}}} is not just the name of a column. Write a literal brace twice."
            raise UserError(f"{setting}={template!r}: {reason}")
    return [name for _, name, _, _ in fields]


def layout_of(row: Row) -> str | None:
    """The mend for rows of turns that stand under another layout; None where a row has no turns."""
    for name in TURNS:
        match row.get(name):
            case [{"from": _}, *_]:
                layout = "conversations"
            case [{"role": _}, *_]:
                layout = "messages"
            case _:
                continue
        rename = "" if layout == name else f"Rename column {name!r} to {layout!r} and set"
        return f"{rename or 'Set'} data.layout={layout}."
    return None


def turns_of(row: Row, layout: str) -> list[Row]:
    """The turns of a row, each an object with a known speaker."""
    speaker, text, known = TURNS[layout]
    other = layout_of(row)
    if layout not in row:
        mend = other or "Set data.layout=text with data.prompt and data.completion, or rename the column."
        columns = ", ".join(row) or "none"
        raise UserError(f"column {layout!r} is missing (data.layout={layout}); its columns are {columns}. {mend}")
    turns = [] if row[layout] is None else row[layout]
    if not isinstance(turns, list):
        mend = " Write the list itself, not a JSON text of it." if isinstance(turns, str) else ""
        raise UserError(f"column {layout!r} holds {kind_of(turns)}: expected a list of turns.{mend}")
    for number, turn in enumerate(turns):
        place = f"{layout}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{place} is {kind_of(turn)}: expected an object with {speaker} and {text}.")
        if speaker not in turn:
            mend = other if other and f"data.layout={layout}" not in other else "Write it, or remove the turn."
            columns = ", ".join(turn) or "nothing"
            raise UserError(f"{place} has no {speaker!r}: expected {speaker} and {text}, got {columns}. {mend}")
        if turn[speaker] not in known:
            choices = f"expected one of {', '.join(known)}"
            raise UserError(f"{place} has {speaker} {turn[speaker]!r}: {choices}. Rename it, or remove the turn.")
    return turns


def first_turns(row: Row) -> list[Segment]:
    """Layout `conversations` as published: the first question and the first answer, without the system prompt."""
    texts: dict[str, str] = {}
    for speaker, text in speeches(row):
        texts.setdefault(speaker, text)
    if not texts.get("gpt", "").strip():
        return []
    return [Segment(f"User: {texts.get('human', '')}\nAssistant:", False), Segment(f" {texts['gpt']}", True)]


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
    for number, turn in enumerate(turns_of(row, "conversations")):
        if "value" not in turn:
            raise UserError(f"conversations[{number}] has no 'value': write its text, or remove the turn.")
        yield turn["from"], as_text(turn["value"], f"conversations[{number}] 'value'")


def bare_turns(row: Row) -> list[Segment]:
    """Layout `messages` without the marks that a chat template adds, for a look at rows without a tokenizer."""
    return [Segment(str(message["content"]), message["role"] == "assistant") for message in messages_of(row)]


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
            reason = f"messages[{index}] has tool_calls, which this model's chat template leaves out"
            raise UserError(f"{reason}: use a model whose template renders them, or write them into the content.")
        segments += [Segment(before.removeprefix(rendered), False), Segment(answer, True)]
        rendered = before + answer
    if any(message["role"] in ("tool", "developer") for message in messages):
        _check_all_are_rendered(messages, render(len(messages), False))
    return segments


def _check_all_are_rendered(messages: list[Row], text: str) -> None:
    """Refuses messages that the chat template leaves out: many know neither tools nor a developer."""
    for number, message in enumerate(messages):
        content = str(message["content"]).strip()
        is_shown = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
        if message["role"] in ("tool", "developer") and not is_shown:
            reason = f"messages[{number}] has role {message['role']!r}, which this model's chat template leaves out"
            raise UserError(f"{reason}: use a model whose template renders it, or rename the role.")


def messages_of(row: Row) -> list[Row]:
    """The messages of a row as a chat template takes them: no nulls, which it would print as None and a table's rows
    hold for every key that other rows have; and the arguments of tool calls as objects, which it writes as JSON."""
    messages = []
    for number, message in enumerate(turns_of(row, "messages")):
        role, calls, content = message["role"], message.get("tool_calls"), message.get("content")
        place = f"messages[{number}] ({role})"
        if calls is not None and not (isinstance(calls, list) and all(map(_function_name, calls))):
            raise UserError(f"{place} has tool_calls of another shape: expected a list of objects with function.name.")
        if calls and role != "assistant":
            raise UserError(f"{place} has tool_calls: only an assistant calls tools.")
        if "content" not in message and not calls:
            raise UserError(f"{place} has no 'content': expected role and content, got {', '.join(message)}.")
        if content is None and role != "assistant":
            raise UserError(f'{place} has null content: write its text, or "" if it is empty.')
        as_text(content, f"{place} 'content'")
        message = {key: value for key, value in message.items() if value is not None}
        message.setdefault("content", "")
        if calls:
            message["tool_calls"] = _without_nulls(calls)
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            with contextlib.suppress(TypeError, ValueError):  # they are an object already, or no JSON
                function["arguments"] = json.loads(function.get("arguments"))
        messages.append(message)
    return messages


def _function_name(call: Any) -> str | None:
    """The name of the function that a tool call calls; None where it has none."""
    match call:
        case {"function": {"name": str(name)}}:
            return name
        case {"name": str(name)} if "function" not in call:
            return name
    return None


def _tools_of(row: Row) -> list[Any] | None:
    """The tools that a row's column `tools` describes to the model, as a list or as JSON of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "null")
        except ValueError as error:
            raise UserError(f"column 'tools' holds broken JSON ({error}): write a list of tools.") from error
    if tools and not isinstance(tools, list):
        raise UserError(f"column 'tools' holds {kind_of(tools)}: expected a list of tools.")
    return _without_nulls(tools) or None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
