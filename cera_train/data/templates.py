"""A tokenizer's chat template: what it renders of messages, where an answer starts in it, and what
it leaves out. Nothing here imports torch."""

import bisect
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, NamedTuple

from cera_train.common.errors import UserError, error_text, errors_at
from cera_train.common.settings import require
from cera_train.data.rows import Row, as_text

GIVEN = {"messages", "tools", "add_generation_prompt"}
"""Variables of a template that the caller fills."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates open or close reasoning in the generation prompt."""

DATE = "strftime_now"
"""The function by which a template writes today's date. Here its value is a setting, so that the
tokens of a row stay the same tomorrow."""

TODAY = "2026-01-01"

DATE_CALL = re.compile(rf"""{DATE}\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")


WITHOUT = "without"
"""A setting that every template has: the end of the generation prompt that is left out, such as a
`<think>` where no answer reasons."""

UNFINISHED_TAG = re.compile(r"<[^<>]*$")

OTHER = "\u22ef"  # a text unlike any


class Refusal(UserError):
    """A template raised an error."""


class Exchange(NamedTuple):
    """An answer, after the text between it and the answer before it in its sequence."""

    prompt: str
    answer: str
    supervised: bool = True
    opening: Row = {}  # noqa: RUF012 - nobody changes it
    """The settings of the template by which the prompt differs from that of inference by
    default."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template with the values of its own variables, such as `enable_thinking`."""

    tokenizer: Any
    text: str
    settings: dict[str, Any]
    special: tuple[str, ...]
    """The tokenizer's special tokens."""
    switches: tuple[str, ...]
    """Those of `SWITCHES` that the template has."""
    forms: tuple[Callable[[Row], Row], ...] = ()
    """What turns a message into the form that the template takes."""
    without: str = ""

    def render(
        self, messages: Sequence[Row], tools: list[Any] | None, is_prompt: bool, **switch: bool
    ) -> str:
        """The messages as text; with `is_prompt` the generation prompt follows. Raises UserError if
        the template refuses them."""
        try:
            text = self.tokenizer.apply_chat_template(
                [self._form(message) for message in messages],
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=is_prompt,
                **self.settings | switch,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            reason = error_text(error) or type(error).__name__
            fix = "Fix the row or chat_template.jinja, or use data.chat=plain."
            raise Refusal(f"the chat template refuses these messages: {reason}. {fix}") from error
        text = as_text(text, "the chat")
        return text.removesuffix(self.without) if is_prompt else text

    def _form(self, message: Row) -> Row:
        return functools.reduce(lambda formed, form: form(formed), self.forms, message)

    def answer(self, before: Sequence[Row], message: Row, tools: list[Any] | None) -> Exchange:
        """The answer as the model would have to write it, its end token included: what its message
        adds to the prompt before it, so there is no marker to search for. The prompt is all that
        inference would show the model.

        Raises:
            UserError: the template refuses the messages, or changes those before the answer.
        """
        switches = [{name: has_reasoning(message)} for name in self.switches]
        for opening in ({}, *switches):
            prompt = self.render(before, tools, is_prompt=True, **opening)
            full = self.render([*before, message], tools, is_prompt=False, **opening)
            if full.startswith(prompt):
                answer = self._ended(full.removeprefix(prompt))
                return Exchange(prompt, answer, opening=opening)
        return self._parted_answer(before, message, tools)

    def _parted_answer(
        self, before: Sequence[Row], message: Row, tools: list[Any] | None
    ) -> Exchange:
        """An answer after which the template renders the text before it otherwise."""
        prompt = self.render(before, tools, is_prompt=True)
        full = self.render([*before, message], tools, is_prompt=False)
        shared = UNFINISHED_TAG.sub("", common_start(prompt, full))
        if shared.startswith(self.render(before, tools, is_prompt=False)):
            # The generation prompt opens reasoning that the finished answer lacks.
            opened = prompt.removeprefix(shared)
            answer = self._ended(full.removeprefix(shared))
            if opened.count("<") > 1:  # and closes it
                return Exchange(prompt, answer)
            return Exchange(shared, answer, opening={WITHOUT: opened})
        # Earlier messages are rendered anew: gpt-oss drops the reasoning of its calls, Mistral
        # moves the system prompt. Texts with other answers share all but the answer, so it starts
        # where the shared text last ends as the prompt does.
        other = [*before, {"role": "assistant", "content": OTHER}]
        shared = common_start(full, self.render(other, tools, is_prompt=False))
        tail = common_end(prompt, shared)
        fix = "Choose a model with another template, or use data.chat=plain."
        require(
            bool(tail),
            f"the chat template renders the messages before an answer differently once it follows, "
            f"so it cannot be told apart. {fix}",
        )
        start = shared.rindex(tail) + len(tail)
        return Exchange(prompt, self._ended(full[start:]))

    def _ended(self, answer: str) -> str:
        """The answer up to its end token. No model generates what a template writes after it: a
        line break, which is left to the next prompt, or the end token of a whole chat."""
        answer = answer.rstrip()
        before = answer.removesuffix(self.tokenizer.eos_token or "").rstrip()
        return before if before.endswith(self.special) else answer


def common_start(one: str, other: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def common_end(text: str, within: str) -> str:
    """The longest end of `text` that stands somewhere in `within`."""
    lengths = range(1, len(text) + 1)
    found = bisect.bisect_left(lengths, True, key=lambda length: text[-length:] not in within)
    return text[len(text) - found :]


def has_reasoning(message: Row) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in message["content"]


# --- opening a template ---------------------------------------------------------------------------


def with_arguments_as_json(message: Row) -> Row:
    """The message with the arguments of its calls as text."""
    calls = []
    for call in message.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | ({"tool_calls": calls} if calls else {})


def with_parts(message: Row) -> Row:
    """The message with its content as a list of parts, as models take it that see images."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def takes_text(template: ChatTemplate) -> bool:
    """Whether the template renders a content that is a text, and not a list of parts alone."""
    try:
        return OTHER in template.render([{"role": "user", "content": OTHER}], None, is_prompt=True)
    except Refusal:
        return False


def open_templates(
    tokenizer: Any, tools: list[Any] | None, settings: dict[str, Any], own: dict[str, Any]
) -> tuple[ChatTemplate, ...]:
    """The template for a row: with the arguments of a call as an object, and as JSON, which some
    templates concatenate.

    Args:
        settings: `data.template_settings`.
        own: the row's `chat_template_kwargs`, which win.

    Raises:
        UserError: the template has no variable of that name.
    """
    text = tokenizer.get_chat_template(None, tools)
    return _with_settings(tokenizer, text, json.dumps(settings), json.dumps(own))


@functools.lru_cache(maxsize=256)
def _with_settings(tokenizer: Any, text: str, settings: str, own: str) -> tuple[ChatTemplate, ...]:
    words = {*re.findall(r"\w+", text)}  # its variables, and more
    places = {
        f"template_settings={settings}": json.loads(settings),
        "column 'chat_template_kwargs'": json.loads(own),
    }
    values = {}
    for place, chosen in places.items():
        for name in chosen:
            require(
                name in words - GIVEN or name == WITHOUT,
                f"{place}: this model's chat template has no variable {name!r}: leave it out.",
            )
        values |= chosen
    dated = with_date(text, values.pop(DATE, TODAY))
    without = as_text(values.pop(WITHOUT, ""), f"data.template_settings: {WITHOUT}")
    switches = tuple(name for name in SWITCHES if name in words)
    added = tokenizer.added_tokens_decoder.values()
    special = tuple(token.content for token in added if token.special)
    template = ChatTemplate(tokenizer, dated, values, special, switches, without=without)
    if not takes_text(template):
        template = replace(template, forms=(with_parts,))
    return template, replace(template, forms=(with_arguments_as_json, *template.forms))


def with_date(text: str, today: str) -> str:
    """The template with a date in place of today's."""
    with errors_at(f"data.template_settings: {DATE}={today}"):
        try:
            day = date.fromisoformat(today)
        except (TypeError, ValueError):
            raise UserError("expected a date, such as 2026-01-31.") from None
    dated = DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), text)
    fix = "Fix the template to format it by a text, or use data.chat=plain."
    require(
        f"{DATE}(" not in dated,
        f"the chat template writes today's date in a form of its own. {fix}",
    )
    return dated
