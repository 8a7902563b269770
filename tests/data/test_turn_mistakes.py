"""Mistakes in rows of turns, and the one line that each gets; and tool calls, which a template renders or not."""

from __future__ import annotations

import json

import pytest
from conftest import CHAT_TEMPLATE
from examples import example_of, supervised_text, with_changes

from cera_train.common.errors import UserError
from cera_train.data.prepare import prepare_data
from cera_train.data.segments import segmenter
from cera_train.settings.data import DataConfig

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "rain"}

KNOWN = "expected system, user, assistant, tool or developer."
TEXT_MEND = "Set data.layout=text with data.prompt and data.completion, or rename the column."


def refusal(row: dict, tokenizer, layout: str, **settings) -> str:
    config = DataConfig(layout=layout, train_files=["t.jsonl"], eval_rows=1, **settings)
    with pytest.raises(UserError) as error:
        segmenter(config, tokenizer)(row)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([USER, {"role": "bot", "content": "b"}], f"messages[1] has role 'bot': {KNOWN} Write 'assistant' for 'bot'."),
        ([{"role": "human", "content": "b"}], f"messages[0] has role 'human': {KNOWN} Write 'user' for 'human'."),
        ([{"role": "User", "content": "b"}], f"messages[0] has role 'User': {KNOWN} Write 'user' for 'User'."),
        ([USER, ANSWER, {"role": "x", "content": "b"}], f"messages[2] has role 'x': {KNOWN} Rename it, or remove the"),
        ([{"role": None, "content": "b"}], f"messages[0] has role None: {KNOWN} Rename it, or remove the turn."),
        ([{"role": ["user"], "content": "b"}], f"messages[0] has role ['user']: {KNOWN} Rename it, or remove the turn"),
        ([{"content": "a"}], "messages[0] has no 'role': expected role and content, got content."),
        ([{}], "messages[0] has no 'role': expected role and content, got nothing."),
        ([{"role": "user"}], "messages[0] (user) has no 'content': expected role and content, got role."),
        ([{"role": "user", "content": None}], 'messages[0] (user) has null content: write its text, or "" if it is e'),
        ([{"role": "system", "content": None}], "messages[0] (system) has null content: write its text, or"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0] (user) 'content' holds a list: expected text"),
        ([{"role": "user", "content": "\ud83d"}], "messages[0] (user) 'content' holds '\\ud83d', half of a surrogate"),
        (["a"], "messages[0] is a str: expected an object with role and content."),
        ("a", "column 'messages' holds a str: expected a list of turns. Write the list itself, not a JSON text of it."),
        ({"role": "user"}, "column 'messages' holds a dict: expected a list of turns."),
        ([HUMAN, GPT], "messages[0] has no 'role': expected role and content, got from, value. Rename column 'message"),
        ([USER, CALLING | {"tool_calls": "x"}], "messages[1] (assistant) has tool_calls of another shape: expected a"),
        ([USER, CALLING | {"tool_calls": [{}]}], "messages[1] (assistant) has tool_calls of another shape: expected a"),
        ([USER | {"tool_calls": [CALL]}], "messages[0] (user) has tool_calls: only an assistant calls tools."),
        ([USER, CALLING], "messages[1] has tool_calls, which this model's chat template leaves out: use a model whose"),
    ],
)
def test_malformed_messages_are_refused_by_their_turn(tokenizer, messages, line):
    assert refusal({"messages": messages}, tokenizer, "messages").startswith(line)


@pytest.mark.parametrize("turns", ["first", "all"])
@pytest.mark.parametrize(
    ("conversations", "line"),
    [
        (
            [{"from": "user", "value": "a"}],
            "conversations[0] has from 'user': expected system, human or gpt. Write 'hu",
        ),
        ([HUMAN, {"from": "bing", "value": "a"}], "conversations[1] has from 'bing': expected system, human or gpt. R"),
        ([{"from": None, "value": "a"}], "conversations[0] has from None: expected system, human or gpt. Rename it, o"),
        ([{"from": "human"}], "conversations[0] has no 'value': write its text, or remove the turn."),
        ([{"from": "gpt", "value": ["a"]}], "conversations[0] 'value' holds a list: expected text."),
        ([USER], "conversations[0] has no 'from': expected from and value, got role, content. Rename column 'convers"),
        (["a"], "conversations[0] is a str: expected an object with from and value."),
        ("a", "column 'conversations' holds a str: expected a list of turns. Write the list itself, not a JSON text o"),
    ],
)
def test_a_malformed_conversation_is_refused_by_its_turn(tokenizer, turns, conversations, line):
    row = {"conversations": conversations}
    assert refusal(row, tokenizer, "conversations", turns=turns).startswith(line)


@pytest.mark.parametrize(
    ("layout", "row", "line"),
    [
        ("messages", {"conversations": [HUMAN]}, "its columns are conversations. Set data.layout=conversations."),
        ("messages", {"conversations": [USER]}, "its columns are conversations. Rename column 'conversations' to 'mes"),
        ("messages", {"text": "a"}, f"its columns are text. {TEXT_MEND}"),
        ("conversations", {"messages": [USER]}, "its columns are messages. Set data.layout=messages."),
        ("conversations", {"messages": [HUMAN]}, "its columns are messages. Rename column 'messages' to 'conversation"),
        ("conversations", {"a": 1, "b": 2}, f"its columns are a, b. {TEXT_MEND}"),
    ],
)
def test_rows_of_another_layout_are_offered_theirs(tokenizer, layout, row, line):
    start = f"column '{layout}' is missing (data.layout={layout}); "
    assert refusal(row, tokenizer, layout).startswith(start + line)


def test_a_bad_turn_is_named_with_its_file_and_line(tokenizer, write_jsonl):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {"role": "bot", "content": "b"}]}]
    path = write_jsonl("x.jsonl", [*rows, rows[0]])
    with pytest.raises(UserError) as error:
        prepare_data(DataConfig(layout="messages", train_files=[str(path)], eval_rows=1), tokenizer)
    assert str(error.value).startswith(f"{path}:2: messages[1] has role 'bot'")


# --- tool calls and empty contents -----------------------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris", "country": None}])
def test_tool_calls_are_supervised_as_the_template_writes_them(tokenizer, arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    last = {"role": "assistant", "content": "It rains.", "tool_calls": None}  # as a table fills what a row lacks
    row = {"messages": [USER, CALLING | {"tool_calls": [call]}, TOOL, last]}
    example = example_of(row, with_changes(tokenizer, chat_template=TOOL_TEMPLATE), layout="messages")
    assert supervised_text(example, tokenizer) == '[weather {"city": "Paris"}]<|im_end|>|It rains.<|im_end|>'
    assert "None" not in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_of_a_row_are_shown_to_the_model(tokenizer, as_text):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [USER, ANSWER], "tools": json.dumps(tools) if as_text else tools}
    example = example_of(row, with_changes(tokenizer, chat_template=TOOL_TEMPLATE), layout="messages")
    assert tokenizer.decode(example.input_ids).startswith(f"<|im_start|>system\n{json.dumps(tools)}<|im_end|>")
    assert supervised_text(example, tokenizer) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("tools", "line"), [("[", "column 'tools' holds broken JSON ("), ({"a": 1}, "column 'tools' holds a dict: expecte")]
)
def test_tools_that_are_no_list_are_refused(tokenizer, tools, line):
    assert refusal({"messages": [USER, ANSWER], "tools": tools}, tokenizer, "messages").startswith(line)


@pytest.mark.parametrize("role", ["tool", "developer"])
def test_a_role_that_the_template_leaves_out_is_refused(tokenizer, role):
    template = CHAT_TEMPLATE.replace("messages %}", "messages if message.role in ('user', 'assistant') %}")
    row = {"messages": [{"role": role, "content": "be brief"}, USER, ANSWER]}
    assert supervised_text(example_of(row, tokenizer, layout="messages"), tokenizer) == "b<|im_end|>"
    line = refusal(row, with_changes(tokenizer, chat_template=template), "messages")
    assert line.startswith(f"messages[0] has role '{role}', which this model's chat template leaves out: use a model")


def test_an_answer_that_is_null_is_no_answer(tokenizer):
    row = {"messages": [USER, {"role": "assistant", "content": None}]}
    config = DataConfig(layout="messages", train_files=["t.jsonl"], eval_rows=1)
    assert segmenter(config, tokenizer)(row) == []
    example = example_of({"messages": [*row["messages"], USER, ANSWER]}, tokenizer, layout="messages")
    assert "None" not in tokenizer.decode(example.input_ids)
    assert supervised_text(example, tokenizer) == "b<|im_end|>"
