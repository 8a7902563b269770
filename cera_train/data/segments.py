"""A row -> segments of text, some of them supervised: by templates (layout `text`), by Alpaca's
columns (`instruction`), by ShareGPT's from and value (`conversations`), or by the tokenizer's chat
template (`messages`). Nothing here imports torch."""

import contextlib
import itertools
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2

from cera_train.common.errors import UserError, errors_at
from cera_train.common.settings import require
from cera_train.data.rows import PROMPT, PlacedRow, Row, as_text, cell_of, kind_of, text_of
from cera_train.settings.data import COLUMN_TEMPLATES, DataConfig, Layout, Turns

SPEAKERS = {"system": "System", "human": "User", "gpt": "Assistant"}
"""The speakers of layout `conversations`, and how they are written."""

TURNS = {
    Layout.messages: ("role", "content", ("user", "assistant", "system", "tool", "developer")),
    Layout.conversations: ("from", "value", ("human", "gpt", "system")),
}
"""The keys of a turn by layout, and the speakers: who asks, who answers, others."""

ASKS = ("user", "human", "tool")
"""The speakers whose turns the assistant answers. What it says before any of them is context."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what a model thinks before it answers."""

TOOLS = "expected a list of objects with function.name"  # the shape of tools and of calls


@dataclass
class Segment:
    """A stretch of text. An answer ends with the end token; one that is not supervised is
    context."""

    text: str
    is_answer: bool = False
    supervised: bool = False


Segmenter = Callable[[Row], list[Segment]]
"""Makes the segments of a row. An empty list means that the row has no answer."""


def answered(prompt: str, answer: str, supervised: bool = True) -> list[Segment]:
    return [Segment(prompt), Segment(answer, True, supervised)]


def prompt_of(segments: list[Segment]) -> str:
    """The text before the first supervised answer; of a document, which has none before, its
    own."""
    before = itertools.takewhile(lambda segment: not segment.supervised, segments)
    return "".join(segment.text for segment in before) or segments[0].text


def segments_of(rows: Iterable[PlacedRow], *segmenters: Segmenter) -> Iterator[list[Segment]]:
    """The segments of each row, of a preference those of its two answers; an error starts with the
    place."""
    for place, row in rows:
        with errors_at(place):
            answers = [to_segments(row) for to_segments in segmenters]
            if len(answers) > 1:
                check_preference(*answers)
        yield from answers


def check_preference(chosen: list[Segment], rejected: list[Segment]) -> None:
    """Raises UserError where there is nothing to prefer."""
    for side, segments in (("chosen", chosen), ("rejected", rejected)):
        require(bool(segments), f"the {side} answer is empty: write one, or remove the row.")
    sides = "the chosen and the rejected answer"
    require(
        prompt_of(chosen) == prompt_of(rejected),
        f"{sides} follow different prompts: pair answers to one prompt.",
    )
    require(chosen != rejected, f"{sides} are equal: remove the row.")


def segmenter(config: DataConfig, tokenizer: Any) -> Segmenter:
    """The first of `segmenters`: of preferences that of the chosen answers."""
    return segmenters(config, tokenizer)[0]


def segmenters(config: DataConfig, tokenizer: Any) -> list[Segmenter]:
    """The function from a row to its segments; of preferences two, for the chosen and the rejected
    answer. Without a tokenizer, chats lack the marks of a chat template."""
    match config.layout:
        case Layout.instruction:
            return [instruction]
        case Layout.conversations:
            return [partial(conversation, wanted=config.turns)]
        case Layout.messages:
            if tokenizer is not None and not tokenizer.chat_template:
                reason = (
                    "data.layout=messages needs a tokenizer with a chat template, and this "
                    "model's has none"
                )
                raise UserError(f"{reason}: use an instruction-tuned model, or data.layout=text.")
            if config.is_paired:
                sides = ("chosen", config.rejected)
                return [partial(preferred_turns, side=side, tokenizer=tokenizer) for side in sides]
            return [partial(chat_turns, wanted=config.turns, tokenizer=tokenizer)]
    prompt, completion = templates_of(config)
    rejected = [templates(prompt, config.rejected, "data.rejected")] if config.is_paired else []
    return [templates(prompt, completion), *rejected]


def templates_of(config: DataConfig) -> tuple[str, str]:
    """The templates of layout text, of documents, and of computed rows."""
    if config.layout == Layout.documents:
        return "", "{text}"
    return COLUMN_TEMPLATES if config.is_computed else (config.prompt, config.completion)


# --- columns of text ------------------------------------------------------------------------------


def templates(prompt: str, completion: str, setting: str = "data.completion") -> Segmenter:
    """Layout `text`: columns in templates. Without a prompt a row is a document."""
    prompt_columns = columns_of(prompt, "data.prompt")
    answer_columns = columns_of(completion, setting)
    setting_of = dict.fromkeys(prompt_columns, "data.prompt")
    setting_of |= {name: setting for name in answer_columns if name not in setting_of}
    fix = "write one in braces, such as {answer}."
    require(bool(answer_columns), f"{setting}={completion!r} names no column: {fix}")

    def segments(row: Row) -> list[Segment]:
        values = {name: text_of(row, name, setting) for name, setting in setting_of.items()}
        if not any(values[name].strip() for name in answer_columns):
            return []
        both = answered(prompt.format_map(values), completion.format_map(values))
        return both if prompt else both[1:]

    return segments


def instruction(row: Row) -> list[Segment]:
    """Layout `instruction`: Alpaca's columns, of which `input` may be empty or missing."""
    asked = text_of(row, "instruction")
    context = as_text(row.get("input"), "column 'input'")
    answer = text_of(row, "output")
    question = f"{asked}\n{context}" if context else asked
    return answered(PROMPT.format(question=question), f" {answer}") if answer.strip() else []


def columns_read(config: DataConfig) -> tuple[list[str], list[str]]:
    """The columns of a question and those of an answer, of a layout without turns."""
    if config.layout == Layout.instruction:
        return ["instruction"], ["output"]
    prompt, completion = templates_of(config)
    return list(dict.fromkeys(columns_of(prompt, "data.prompt"))), columns_of(
        completion, "data.completion"
    )


def columns_of(template: str, setting: str = "template") -> list[str]:
    """The columns that the template of a setting names. One that does more is refused: `{a.b}`,
    `{a[0]}`, `{a:>9}`."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(
            f"{setting}={template!r} is malformed: {error}. Write a literal brace twice."
        ) from None
    for _, name, format_spec, conversion in fields:
        if format_spec or conversion or not re.fullmatch(r"[^\W\d][^.\[{]*", name):
            reason = f"{{{name}}} is not just the name of a column. Write a literal brace twice."
            raise UserError(f"{setting}={template!r}: {reason}")
    return [name for _, name, _, _ in fields]


# --- rows of turns --------------------------------------------------------------------------------


def turns_of(row: Row, layout: str) -> list[Row]:
    """The turns of a row, each an object with a known speaker and a text; a null is an empty
    text."""
    speaker, text, known = TURNS[layout]
    turns = cell_of(row, layout, " Choose another data.layout.") or []
    require(
        isinstance(turns, list),
        f"column {layout!r} holds {kind_of(turns)}: expected a list of turns.",
    )
    for number, turn in enumerate(turns):
        is_turn = (
            isinstance(turn, dict)
            and turn.get(speaker) in known
            and (text in turn or turn.get("tool_calls"))
        )
        if not is_turn:
            expected = f"expected an object with {speaker} (one of {', '.join(known)}) and {text}"
            raise UserError(
                f"{layout}[{number}] is {str(turn)[:60]!r}: {expected}. Fix it, or remove the turn."
            )
    return [
        turn | {text: as_text(turn.get(text), f"{layout}[{number}] {text!r}")}
        for number, turn in enumerate(turns)
    ]


def answers_of(turns: list[Row], wanted: Turns, layout: str) -> tuple[int, list[int], list[int]]:
    """The number of the first question; those of the answers after it, which are not empty; and
    those of the answers that are supervised: a turn with `train: false` or `weight: 0` is not."""
    speaker, text, (_, model, *_) = TURNS[layout]
    asked = next(
        (number for number, turn in enumerate(turns) if turn[speaker] in ASKS), 0
    )  # perhaps a system prompt
    answers = [
        number
        for number, turn in enumerate(turns)
        if turn[speaker] == model
        and number > asked
        and (turn[text].strip() or (layout == Layout.messages and turn.get("tool_calls")))
    ]
    trained = []
    for number in answers:
        flag = turns[number].get("train", turns[number].get("weight"))
        expected = "expected train: true or false, or weight: 1 or 0."
        require(
            flag in (None, 0, 1), f"{layout}[{number}] has the flag {str(flag)[:60]!r}: {expected}"
        )
        if flag != 0:
            trained.append(number)
    return (
        asked,
        answers,
        {Turns.first: trained[:1], Turns.last: trained[-1:], Turns.all: trained}[wanted],
    )


def conversation(row: Row, wanted: Turns) -> list[Segment]:
    """Layout `conversations`, up to the last answer that is supervised."""
    turns = turns_of(row, "conversations")
    spoken = [(turn["from"], turn["value"]) for turn in turns]
    asked, answers, supervised = answers_of(turns, wanted, "conversations")
    if (
        wanted == Turns.first
    ):  # as published: the first question and answer, without the system prompt
        firsts = dict(reversed(spoken[asked:]))
        question = firsts.get("human", "")
        answer = firsts.get("gpt", "")
        is_trained = answer.strip() and answers and answers[0] in supervised
        return answered(f"User: {question}\nAssistant:", f" {answer}") if is_trained else []
    segments = []
    context = ""
    for number, (speaker, text) in enumerate(spoken[: max(supervised, default=-1) + 1]):
        if number in answers:
            segments += answered(f"{context}Assistant:", f" {text}", number in supervised)
            context = "\n"
        else:
            context += f"{SPEAKERS[speaker]}: {text}\n"
    return segments


def chat_turns(row: Row, wanted: Turns, tokenizer: Any) -> list[Segment]:
    """Layout `messages`: the tokenizer's chat template. What a supervised turn adds to the rendered
    conversation so far is its answer, so no marker has to be searched for. Tool calls and reasoning
    are part of the turn."""
    messages = messages_of(row)
    tools = _tools_of(row)
    _, answers, supervised = answers_of(messages, wanted, "messages")
    if tokenizer is None:
        turns = enumerate(messages[: max(supervised, default=-1) + 1])
        return [
            Segment(message["content"], number in answers, number in supervised)
            for number, message in turns
        ]
    segments = []
    rendered = ""

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                messages[:count],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        return as_text(text, "the chat")

    for number in supervised:
        before = render(number, True)
        after = render(number + 1, False)
        is_continued = after.startswith(before)
        if not (is_continued and before.startswith(rendered)):
            what = "earlier turns"
            fix = "Set data.turns=last"
            if not is_continued:  # the last answer would not be found either
                what = "a prompt, such as one that ends in <think>,"
                fix = "Choose a model with another template"
            raise UserError(
                f"the chat template renders {what} differently once an answer follows, so answers "
                f"cannot be told "
                f"apart. {fix}, or use data.layout=text."
            )
        # A template may write a line break after its end token: nobody generates that, it belongs
        # to the next prompt.
        answer = after.removeprefix(before).rstrip()
        message = messages[number]
        said = message["content"].rpartition("</think>")[
            2
        ]  # a template may write such reasoning anew
        parts = [
            as_text(message[key], f"messages[{number}] {key!r}")
            for key in REASONING
            if key in message
        ]
        _check_is_rendered(f"messages[{number}], of role 'assistant',", [said, *parts], answer)
        segments += answered(before.removeprefix(rendered), answer)
        rendered = before + answer
    for number, message in enumerate(messages[: max(supervised, default=-1) + 1]):
        said = [message["content"]] if message["role"] in ("system", "developer", "tool") else []
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
        _check_is_rendered(
            f"messages[{number}], of role {message['role']!r},", [*said, *calls], rendered
        )
    for tool in tools or () if supervised else ():
        _check_is_rendered(
            "column 'tools'", [str(tool.get("function", tool).get("name", ""))], rendered
        )
    return segments


def preferred_turns(row: Row, side: str, tokenizer: Any) -> list[Segment]:
    """One side of a preference in layout `messages`: its last answer, after a list `prompt` where
    the row has one."""
    before = row.get("prompt")
    turns = row.get(side)
    require(
        isinstance(turns, list),
        f"column {side!r} holds {kind_of(turns)}: expected a list of messages.",
    )
    messages = [*(before if isinstance(before, list) else ()), *turns]
    return chat_turns(row | {"messages": messages}, Turns.last, tokenizer)


def _check_is_rendered(what: str, texts: list[str], rendered: str) -> None:
    """Refuses what the chat template leaves out: many know no tools, no developer and no
    reasoning."""
    for text in map(str.strip, texts):
        if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
            fix = "use a model whose template renders it, or write it into another turn."
            raise UserError(f"{what} is left out by this model's chat template: {fix}")


def messages_of(row: Row) -> list[Row]:
    """The messages of a row as a chat template takes them: texts, no nulls, which it would print as
    None and a table's rows hold for every key that other rows have, and the arguments of tool calls
    as objects."""
    messages = []
    for number, turn in enumerate(turns_of(row, "messages")):
        message = _without_nulls(turn)
        calls = message.get("tool_calls", [])
        for call in calls if isinstance(calls, list) else [None]:
            match call:
                case {"function": {"name": str()} as function}:
                    with contextlib.suppress(
                        TypeError, ValueError
                    ):  # they are an object already, or no JSON
                        function["arguments"] = json.loads(function.get("arguments"))
                case _:
                    raise UserError(f"messages[{number}] has tool_calls of another shape: {TOOLS}.")
        messages.append(message)
    return messages


def _tools_of(row: Row) -> list[Any] | None:
    """The tools that a row's column `tools` describes to the model, as a list or as JSON of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "null")
        except ValueError as error:
            raise UserError(
                f"column 'tools' holds broken JSON ({error}): write a list of tools."
            ) from error
    tools = _without_nulls(tools) or []
    are_tools = isinstance(tools, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    )
    require(are_tools, f"column 'tools' is {str(tools)[:60]!r}: {TOOLS}.")
    return tools or None


def _without_nulls(value: Any) -> Any:
    """A copy of nested dicts and lists without the keys that hold null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
