"""A row of turns -> its exchanges: ShareGPT's from and value (`conversations`), written as plain
text, or role and content (`messages`), rendered by the tokenizer's chat template. Nothing here
imports torch."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.data.rows import Row, as_text, cell_of, kind_of
from cera_train.settings.data import Layout, Turns

TURNS = {
    Layout.messages: ("role", "content", ("user", "assistant", "system", "tool", "developer")),
    Layout.conversations: ("from", "value", ("human", "gpt", "system")),
}
"""For each layout, the keys of a turn's speaker and text, and the speakers: those who ask, the one
who answers, the others."""

ASKS = ("user", "human", "tool")
"""Speakers whose turns the assistant answers. What it says before any of them is context."""

WRITTEN = {"system": "System", "human": "User", "gpt": "Assistant"}
"""The speakers of layout `conversations`, as they appear in the text."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what a model thinks before it answers."""

TOOLS = "expected a list of objects with function.name"  # the shape of tools and calls


class Exchange(NamedTuple):
    """An answer, after the text between it and the answer before it."""

    prompt: str
    answer: str
    supervised: bool = True


class Answers(NamedTuple):
    """The indices of the turns that answer."""

    given: list[int]  # every non-empty answer
    supervised: list[int]  # those in the loss


# --- turns ----------------------------------------------------------------------------------------


def turns_of(row: Row, layout: str) -> list[Row]:
    """The turns of a row: objects with a known speaker and a text; null is empty."""
    _, text, _ = TURNS[layout]
    column = str(layout)
    turns = cell_of(row, column, " Choose another data.layout.") or []
    require(
        isinstance(turns, list),
        f"column {column!r} holds {kind_of(turns)}: expected a list of turns.",
    )
    for number, turn in enumerate(turns):
        _check_turn(turn, layout, number)
    return [
        turn | {text: as_text(turn.get(text), f"{layout}[{number}] {text!r}")}
        for number, turn in enumerate(turns)
    ]


def _check_turn(turn: Any, layout: str, number: int) -> None:
    speaker, text, known = TURNS[layout]
    is_object = isinstance(turn, dict)
    if is_object and turn.get(speaker) in known and (text in turn or turn.get("tool_calls")):
        return
    expected = f"expected an object with {speaker} (one of {', '.join(known)}) and {text}"
    raise UserError(
        f"{layout}[{number}] is {str(turn)[:60]!r}: {expected}. Fix it, or remove the turn."
    )


def first_question(turns: Sequence[Row], layout: str) -> int:
    """The index of the first turn that asks; 0 without one. A system prompt may precede it."""
    speaker = TURNS[layout][0]
    questions = (number for number, turn in enumerate(turns) if turn[speaker] in ASKS)
    return next(questions, 0)


def answers_of(turns: Sequence[Row], wanted: Turns, layout: str) -> Answers:
    """The answers after the first question, and which of them are supervised: those that
    `data.turns` selects, without those marked `train: false` or `weight: 0`."""
    speaker, text, (_, assistant, *_) = TURNS[layout]
    question = first_question(turns, layout)
    given = []
    for number, turn in enumerate(turns):
        has_calls = layout == Layout.messages and bool(turn.get("tool_calls"))
        is_answer = number > question and turn[speaker] == assistant
        if is_answer and (turn[text].strip() or has_calls):
            given.append(number)
    trained = [number for number in given if _is_trained(turns[number], f"{layout}[{number}]")]
    match wanted:
        case Turns.first:
            return Answers(given, trained[:1])
        case Turns.last:
            return Answers(given, trained[-1:])
    return Answers(given, trained)


def _is_trained(turn: Row, place: str) -> bool:
    flag = turn.get("train", turn.get("weight"))
    expected = "expected train: true or false, or weight: 1 or 0."
    require(flag in (None, 0, 1), f"{place} has the flag {str(flag)[:60]!r}: {expected}")
    return flag != 0


# --- layout `conversations` -----------------------------------------------------------------------


def conversation(row: Row, wanted: Turns) -> list[Exchange]:
    """Layout `conversations`, up to the last answer that is supervised."""
    layout = Layout.conversations
    turns = turns_of(row, layout)
    answers = answers_of(turns, wanted, layout)
    if not answers.supervised:
        return []
    if wanted == Turns.first:
        exchange = published_exchange(turns[first_question(turns, layout) :])
        is_trained = answers.given[0] in answers.supervised
        return [exchange] if is_trained and exchange.answer.strip() else []
    exchanges = []
    context = ""
    for number, turn in enumerate(turns[: answers.supervised[-1] + 1]):
        if number in answers.given:
            is_supervised = number in answers.supervised
            exchanges.append(Exchange(f"{context}Assistant:", f" {turn['value']}", is_supervised))
            context = "\n"
        else:
            context += f"{WRITTEN[turn['from']]}: {turn['value']}\n"
    return exchanges


def published_exchange(turns: Sequence[Row]) -> Exchange:
    """The first question and the first answer, without the system prompt, as published."""

    def first(speaker: str) -> str:
        return next((turn["value"] for turn in turns if turn["from"] == speaker), "")

    return Exchange(f"User: {first('human')}\nAssistant:", f" {first('gpt')}")


# --- layout `messages` ----------------------------------------------------------------------------


def chat(row: Row, wanted: Turns, tokenizer: Any) -> list[Exchange]:
    """Layout `messages`, rendered by the chat template; without a tokenizer, just the messages'
    texts. Tool calls and reasoning belong to the answer."""
    messages = messages_of(row)
    tools = tools_of(row)
    answers = answers_of(messages, wanted, Layout.messages)
    if not answers.supervised:
        return []
    if tokenizer is None:
        return unmarked_exchanges(messages, answers)
    return rendered_exchanges(messages, tools, answers.supervised, tokenizer)


def preference(row: Row, side: str, tokenizer: Any) -> list[Exchange]:
    """One side of a preference in layout `messages`: its last answer, after the list `prompt` if
    the row has one."""
    before = row.get("prompt")
    turns = row.get(side)
    require(
        isinstance(turns, list),
        f"column {side!r} holds {kind_of(turns)}: expected a list of messages.",
    )
    messages = [*before, *turns] if isinstance(before, list) else turns
    return chat(row | {"messages": messages}, Turns.last, tokenizer)


def unmarked_exchanges(messages: Sequence[Row], answers: Answers) -> list[Exchange]:
    """The texts up to the last supervised answer, without chat markup."""
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


def rendered_exchanges(
    messages: Sequence[Row], tools: list[Any] | None, supervised: Sequence[int], tokenizer: Any
) -> list[Exchange]:
    """The supervised answers as the chat template renders them. An answer is what its message adds
    to the prompt before it, so there is no marker to search for.

    Raises:
        UserError: the template refuses the messages, renders an earlier part anew once an answer
            follows, or leaves something out.
    """
    exchanges = []
    rendered = ""  # up to the last answer
    for number in supervised:
        prompt = render_chat(messages[:number], tools, tokenizer, add_generation_prompt=True)
        full = render_chat(messages[: number + 1], tools, tokenizer, add_generation_prompt=False)
        _check_continues(rendered, prompt, full)
        # A template may write a line break after its end token: no model generates it, so it
        # belongs to the next prompt.
        answer = full.removeprefix(prompt).rstrip()
        _check_answer_is_rendered(messages[number], f"messages[{number}]", answer)
        exchanges.append(Exchange(prompt.removeprefix(rendered), answer))
        rendered = prompt + answer
    _check_context_is_rendered(messages[: supervised[-1] + 1], tools, rendered)
    return exchanges


def render_chat(
    messages: Sequence[Row], tools: list[Any] | None, tokenizer: Any, add_generation_prompt: bool
) -> str:
    """The messages as the chat template renders them. Raises UserError if it refuses them."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error
    return as_text(text, "the chat")


def _check_continues(rendered: str, prompt: str, full: str) -> None:
    """Raises UserError unless `full` continues the prompt, and the prompt continues what was
    rendered before."""
    if full.startswith(prompt) and prompt.startswith(rendered):
        return
    if not full.startswith(prompt):  # even the last answer could not be found
        what = "a prompt, such as one that ends in <think>,"
        fix = "Choose a model with another template"
    else:
        what = "earlier turns"
        fix = "Set data.turns=last"
    raise UserError(
        f"the chat template renders {what} differently once an answer follows, so answers cannot "
        f"be told apart. {fix}, or use data.layout=text."
    )


def _check_answer_is_rendered(message: Row, place: str, answer: str) -> None:
    # A template may render reasoning inside the content in another form.
    texts = [message["content"].rpartition("</think>")[2]]
    for key in REASONING:
        if key in message:
            texts.append(as_text(message[key], f"{place} {key!r}"))
    _check_is_rendered(f"{place}, of role 'assistant',", texts, answer)


def _check_context_is_rendered(
    messages: Sequence[Row], tools: list[Any] | None, rendered: str
) -> None:
    for number, message in enumerate(messages):
        texts = [call["function"]["name"] for call in message.get("tool_calls", [])]
        if message["role"] in ("system", "developer", "tool"):
            texts.insert(0, message["content"])
        _check_is_rendered(f"messages[{number}], of role {message['role']!r},", texts, rendered)
    for tool in tools or []:
        name = str(tool.get("function", tool).get("name", ""))
        _check_is_rendered("column 'tools'", [name], rendered)


def _check_is_rendered(what: str, texts: list[str], rendered: str) -> None:
    """Raises UserError for a text that the chat template leaves out: many templates ignore tools,
    developers or reasoning."""
    for text in map(str.strip, texts):
        as_json = json.dumps(text, ensure_ascii=False)[1:-1]
        if text not in rendered and as_json not in rendered:
            fix = "use a model whose template renders it, or write it into another turn."
            raise UserError(f"{what} is left out by this model's chat template: {fix}")


# --- what a chat template gets --------------------------------------------------------------------


def messages_of(row: Row) -> list[Row]:
    """The messages of a row as a chat template expects them: without nulls, which it would print as
    None and with which a table fills keys that only other rows have; and with the arguments of tool
    calls as objects."""
    messages = [_without_nulls(turn) for turn in turns_of(row, Layout.messages)]
    for number, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        another_shape = f"messages[{number}] has tool_calls of another shape: {TOOLS}."
        require(isinstance(calls, list), another_shape)
        for call in calls:
            match call:
                case {"function": {"name": str()} as function}:
                    # The arguments may be an object already, or not be JSON.
                    with contextlib.suppress(TypeError, ValueError):
                        function["arguments"] = json.loads(function.get("arguments"))
                case _:
                    raise UserError(another_shape)
    return messages


def tools_of(row: Row) -> list[Any] | None:
    """The tools that a row's column `tools` describes to the model: a list, or a list as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "null")
        except ValueError as error:
            raise UserError(
                f"column 'tools' holds broken JSON ({error}): write a list of tools."
            ) from error
    tools = _without_nulls(tools) or []
    are_tools = isinstance(tools, list) and all(map(_is_tool, tools))
    require(are_tools, f"column 'tools' is {str(tools)[:60]!r}: {TOOLS}.")
    return tools or None


def _is_tool(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function", tool), dict)


def _without_nulls(value: Any) -> Any:
    """A copy of nested dicts and lists without the keys that hold null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
