"""How rows become chats, which settings reach their template, and which chats are refused."""

import json

import pytest
from conftest import CHAT_TEMPLATE
from examples import (
    example_of,
    examples_of,
    questions_of,
    supervised_text,
    texts_of,
    with_changes,
)

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.data.sources import decide_switches
from cera_train.settings.data import DataConfig, MixPart

pytest_plugins = ["examples"]

CALLS = (
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}"
)
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}" + CALLS)
)
"""With tools and their calls."""

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reasoning of the last answer alone, as Qwen3 renders it."""

OPENS = THINKS.replace(
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>"
    "{% endif %}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    "{% endif %}",
)
"""A generation prompt that opens reasoning, unless it is switched off."""


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASKED = [user("hello"), assistant("hello there")]
WITHOUT = {"messages": ASKED}
THOUGHT = {"messages": [ASKED[0], ASKED[1] | {"reasoning_content": "hm"}]}


# --- rows that become chats -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "messages"),
    [
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            {"layout": "conversations"},
            [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")],
        ),
        (
            {"instruction": "Add.", "input": "1 + 1", "output": "2"},
            {"layout": "instruction"},
            [user("Add.\n1 + 1"), assistant("2")],
        ),
        (
            {"question": "1 + 1?", "answer": "2"},
            {"layout": "text", "chat": "template", "prompt": "{question} "},
            [user("1 + 1?"), assistant("2")],
        ),
        (
            {"messages": [user([{"type": "text", "text": "a"}]), assistant("b")]},
            {"layout": "messages"},
            [user("a"), assistant("b")],
        ),
    ],
    ids=["ShareGPT with a system prompt", "Alpaca", "columns", "parts"],
)
def test_rows_of_every_layout_are_written_by_the_chat_template(tokenizer, row, settings, messages):
    chat = example_of({"messages": messages}, tokenizer, layout="messages")
    assert example_of(row, tokenizer, **settings) == chat


def test_calls_of_tools_are_read_in_sharegpts_form_and_in_openais(tokenizer):
    chat = with_changes(tokenizer, chat_template=TEMPLATE)
    function = TOOL["function"]
    call = json.dumps(CALL["function"])
    turns = [
        ("human", "Rome?"),
        ("function_call", call),
        ("observation", "sunny"),
        ("gpt", "It is sunny."),
    ]
    sharegpt = {
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "tools": json.dumps([function]),  # without its type, as LLaMA-Factory writes it
    }
    tool = {"role": "tool", "content": "sunny"}
    arguments = json.dumps(CALL["function"]["arguments"])
    # None, as a table fills in what a row lacks.
    last = assistant("It is sunny.", tool_calls=None)
    supervised = '[weather {"city": "Rome"}]<|im_end|>|It is sunny.<|im_end|>'
    for passed in ({"city": "Rome"}, {"city": "Rome", "country": None}, arguments):
        calling = {"type": "function", "function": {"name": "weather", "arguments": passed}}
        messages = [user("Rome?"), assistant(None, tool_calls=[calling]), tool, last]
        openai = example_of({"messages": messages, "tools": [TOOL]}, chat, layout="messages")
        assert example_of(sharegpt, chat, layout="conversations", turns="all") == openai
        assert supervised_text(openai, chat) == supervised


# --- several sequences ----------------------------------------------------------------------------


def test_an_answer_after_turns_that_the_template_shortens_is_a_sequence_of_its_own(
    tokenizer, config_of
):
    chat = with_changes(tokenizer, chat_template=THINKS)
    rows = [
        {
            "messages": [
                user(f"hello {number}"),
                assistant("there", reasoning_content="hm"),
                user("next?"),
                assistant("value", thinking="so"),
            ]
        }
        for number in range(8)
    ]
    data = prepare_data(config_of(rows, [], layout="messages"), chat)
    # Both sequences of a row are on one side, and both are one row.
    assert (len(data.train), len(data.evaluation)) == (14, 2)
    assert data.train.describe().startswith("7 rows as 14 sequences, ")
    first, second = texts_of(data.evaluation, chat)
    assert "hm" in first
    assert "hm" not in second
    assert second.endswith(
        "next?<|im_end|>\n<|im_start|>assistant\n<think>so</think>value<|im_end|>"
    )
    pair = {
        "prompt": rows[0]["messages"][:3],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    sides = examples_of(pair, chat, layout="messages", rejected="rejected")
    assert [supervised_text(side, chat) for side in sides] == [
        "<think></think>a<|im_end|>",
        "<think></think>b<|im_end|>",
    ]


# --- settings of the template ---------------------------------------------------------------------


def test_settings_reach_the_template_and_a_row_has_the_last_word(tokenizer):
    chat = with_changes(
        tokenizer, chat_template="{{ tone }} {{ strftime_now('%d %b %Y') }}:" + CHAT_TEMPLATE
    )
    row = {"messages": ASKED}

    def start(row: dict, **settings) -> str:
        example = example_of(row, chat, layout="messages", template_settings=settings)
        return chat.decode(example.input_ids).split(":")[0]

    assert start(row) == " 01 Jan 2026"  # whatever today is
    assert start(row, tone="calm", strftime_now="2024-02-29") == "calm 29 Feb 2024"
    assert start(row | {"chat_template_kwargs": {"tone": "loud"}}, tone="calm")[:4] == "loud"


def test_a_question_does_not_show_whether_its_answer_reasons(tokenizer):
    chat = with_changes(tokenizer, chat_template=OPENS)
    for row in (THOUGHT, WITHOUT):
        [question] = questions_of(row, chat, layout="messages")
        assert question.prompt.endswith("assistant\n<think>")
        assert (question.text, question.gold) == ("hello", "hello there")


def test_a_switch_that_all_answers_need_is_a_setting_of_the_run(tokenizer, config_of, write_jsonl):
    """What asks the model later asks as it was trained."""
    chat = with_changes(tokenizer, chat_template=OPENS)

    def settings(rows: list[dict], chosen: dict | None = None, count: int | None = None) -> dict:
        config = config_of(rows, layout="messages", template_settings=chosen, train_rows=count)
        return decide_switches(config, chat).template_settings

    assert settings([WITHOUT] * 3) == {"enable_thinking": False}
    assert settings([WITHOUT] * 3 + [THOUGHT], count=3) == {"enable_thinking": False}
    assert settings([THOUGHT] * 3) == settings([WITHOUT, THOUGHT]) == {}

    off = {"enable_thinking": False}
    own = WITHOUT | {"chat_template_kwargs": off}
    assert settings([own] * 3) == settings([own, WITHOUT]) == off
    assert settings([own, THOUGHT]) == {}
    answered = config_of([own] * 3, layout="messages")
    assert decide_switches(answered, chat, learns_answers=False).template_settings == off

    with pytest.raises(UserError, match=r"has enable_thinking=true, and all answers of the first "):
        settings([WITHOUT] * 3, {"enable_thinking": True})

    files = [str(write_jsonl(f"{len(rows)}.jsonl", rows)) for rows in ([WITHOUT], [THOUGHT] * 2)]
    parts = [
        MixPart(train_files=[file], weight=weight, eval_rows=0)
        for file, weight in zip(files, (1, 0), strict=True)
    ]
    parts[1].eval_rows = 1
    mixed = DataConfig(layout="messages", mix=parts)
    assert decide_switches(mixed, chat).template_settings == off  # the second is not trained on

    chat.chat_template = OPENS.replace("enable_thinking is not defined or enable_thinking", "true")
    assert settings([WITHOUT] * 3) == {"without": "<think>"}


# --- refusals -------------------------------------------------------------------------------------


def test_arguments_that_a_template_would_write_as_python_come_out_as_json(tokenizer):
    template = TEMPLATE.replace(" | tojson }}]", " }}]")
    chat = with_changes(tokenizer, chat_template=template)
    row = {"messages": [user("a"), assistant("", tool_calls=[CALL]), user("b"), assistant("c")]}
    example = example_of(row, chat, layout="messages", turns="all")
    assert supervised_text(example, chat).startswith('[weather {"city": "Rome"}]')
