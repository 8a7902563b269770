"""Which tokens of a row are supervised: as text on hand-checked rows; ids are compared with the
tokenizer's own."""

import copy

import pytest
from conftest import CHAT_TEMPLATE
from examples import (
    CHAT,
    CONVERSATION,
    ROLES,
    example_of,
    questions_of,
    supervised_text,
    with_changes,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cera_train.data.chats import templates
from cera_train.data.reader import Example, Reader
from cera_train.data.tokens import ids_of

EMPTY = Example([], [], has_answer=False)

# --- layout text ----------------------------------------------------------------------------------


def test_prompt_and_completion_never_merge_into_one_token(tokenizer):
    example = example_of({"a": "hel", "b": "lo"}, tokenizer, prompt="{a}", completion="{b}")
    assert len(ids_of("hello", tokenizer)) < len(example.input_ids) - 2
    assert supervised_text(example, tokenizer) == "lo</s>"


@pytest.mark.parametrize("prepend", ["always", "first"])
def test_a_tokenizer_that_adds_a_leading_space_adds_none_within_a_row(prepend):
    backend = Tokenizer(
        BPE({letter: number for number, letter in enumerate("\u2581\nQA: abc?")}, [])
    )
    backend.pre_tokenizer = Metaspace(prepend_scheme=prepend, split=False)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    example = example_of({"a": "a b?", "b": "cc"}, spaced, prompt="Q: {a}\nA:\n", completion="{b}")
    assert example.input_ids == [*ids_of("Q: a b?\nA:\ncc", spaced), spaced.eos_token_id]
    assert example.loss_mask == [False] * (len(example.input_ids) - 3) + [True] * 3


def test_the_end_token_is_supervised_even_if_it_pads_or_follows_a_special_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = example_of({"question": "a", "answer": "see <|im_start|>"}, tokenizer, loss_on="all")
    assert tokenizer.decode(example.input_ids).endswith(" see <|im_start|></s>")
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_without_a_start_token_none_is_added_and_the_first_token_is_not_supervised(tokenizer):
    silent = copy.deepcopy(tokenizer)  # has a start token, and does not write it
    silent.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for bare in (silent, with_changes(silent, bos_token=None)):
        example = example_of({"question": "a", "answer": "b"}, bare, loss_on="all")
        assert bare.decode(example.input_ids) == "Question: a\nAnswer: b</s>"
        assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)
        only_answer = example_of({"question": "", "answer": "b"}, bare, prompt="{question}")
        # Without the blank of " b", which comes first: nothing predicts it.
        assert supervised_text(only_answer, bare) == "b</s>"


def test_numbers_become_text_null_becomes_empty_and_braces_in_values_stay(tokenizer):
    row = {"question": None, "answer": 42, "reason": 0.5}
    example = example_of(row, tokenizer, completion=" {answer} {reason}")
    assert tokenizer.decode(example.input_ids) == "<s>Question: \nAnswer: 42 0.5</s>"
    pair = templates(r"{{{a}}} {b c}:", " {a}")({"a": r"\frac{1}{2} {a.__class__}", "b c": "x"})
    assert pair == (r"{\frac{1}{2} {a.__class__}} x:", r" \frac{1}{2} {a.__class__}")


def test_a_row_without_an_answer_is_empty_and_asks_nothing(tokenizer):
    row = {"question": "a", "answer": " \n\u00a0", "reason": "because"}
    assert example_of(row, tokenizer) == EMPTY
    assert questions_of(row, tokenizer) == []
    assert example_of(row, tokenizer, completion=" {answer} {reason}").has_answer


# --- layout conversations -------------------------------------------------------------------------


def test_slimorca_takes_the_first_question_and_answer_without_the_system_prompt(compose, tokenizer):
    published = compose(
        "data=slimorca", "data.train_files=[t.jsonl]", "data.eval_files=[e.jsonl]"
    ).data
    [example] = Reader(published, tokenizer).examples([("a row", CONVERSATION)])
    assert supervised_text(example, tokenizer) == "User: hello\nAssistant: hello there</s>"


def test_turns_all_keeps_the_system_prompt_and_supervises_every_answer(tokenizer):
    plain = {"layout": "conversations", "turns": "all", "chat": "plain"}
    example = example_of(CONVERSATION, tokenizer, **plain)
    assert tokenizer.decode(example.input_ids) == (
        "<s>System: Be brief.\nUser: hello\nAssistant: hello there</s>\nUser: next?\nAssistant: "
        "0.84</s>"
    )
    assert supervised_text(example, tokenizer) == " hello there</s>| 0.84</s>"
    # An empty answer between others is context.
    turns = [("human", "a"), ("gpt", " "), ("human", "b"), ("gpt", "c")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    [question] = questions_of(row, tokenizer, **plain)
    assert question.prompt == "User: a\nAssistant:  \nUser: b\nAssistant:"
    assert supervised_text(example_of(row, tokenizer, **plain), tokenizer) == " c</s>"


@pytest.mark.parametrize("before", [[], [{"from": "system", "value": "Be brief."}]])
def test_what_the_assistant_says_before_a_question_is_context(tokenizer, before):
    row = {
        "conversations": [
            *before,
            {"from": "gpt", "value": "Hi!"},
            *CONVERSATION["conversations"][1:],
        ]
    }
    plain = {"layout": "conversations", "chat": "plain"}
    [asked] = questions_of(row, tokenizer, turns="first", **plain)
    assert (asked.prompt, asked.gold) == ("User: hello\nAssistant:", "hello there")
    first, second = questions_of(row, tokenizer, turns="all", **plain)
    assert (first.gold, second.gold) == ("hello there", "0.84")
    assert first.prompt.endswith("Assistant: Hi!\nUser: hello\nAssistant:")
    chat = {
        "messages": [
            {"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
        ]
    }
    example = example_of(chat, tokenizer, layout="messages")
    assert supervised_text(example, tokenizer) == "hello there<|im_end|>|0.84<|im_end|>"
    assert "<|im_start|>assistant\nHi!<|im_end|>" in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("turns", ["first", "all"])
def test_a_conversation_without_an_answer_is_empty(tokenizer, turns):
    def example(conversation: list | None) -> Example:
        return example_of({"conversations": conversation}, tokenizer, **plain)

    plain = {"layout": "conversations", "turns": turns, "chat": "plain"}
    question = {"from": "human", "value": "a"}
    unasked = [{"from": "gpt", "value": "Hello."}]
    by_system = example([{"from": "system", "value": "Greet."}, *unasked])
    assert supervised_text(by_system, tokenizer) == " Hello.</s>"
    for conversation in (None, [question], [question, {"from": "gpt", "value": " \n"}], unasked):
        assert example(conversation) == EMPTY


@pytest.mark.parametrize(
    ("row", "layout", "chat", "first", "last"),
    [
        (CONVERSATION, "conversations", "plain", " hello there</s>", " 0.84</s>"),
        (CHAT, "messages", "template", "hello there<|im_end|>", "0.84<|im_end|>"),
    ],
)
def test_flags_and_turns_choose_what_is_supervised(tokenizer, row, layout, chat, first, last):
    def supervised(turns: list, wanted: str) -> str:
        example = example_of({layout: turns}, tokenizer, layout=layout, turns=wanted, chat=chat)
        return supervised_text(example, tokenizer)

    turns = row[layout]
    assert [supervised(turns, wanted) for wanted in ("first", "last", "all")] == [
        first,
        last,
        f"{first}|{last}",
    ]
    for flag in ({"train": False}, {"weight": 0.0}):
        assert supervised([*turns[:2], turns[2] | flag, *turns[3:]], "all") == last
        assert supervised([*turns[:4], turns[4] | flag], "last") == first
    if layout == "messages":  # in two columns, the answers of the first are context
        row = {"prompt": turns[:4], "completion": turns[4:]}
        assert supervised_text(example_of(row, tokenizer, layout=layout), tokenizer) == last
    first_alone = [*turns[:2], turns[2] | {"weight": 0}]
    assert example_of({layout: first_alone}, tokenizer, layout=layout, turns="first") == EMPTY
    asked = {layout: [*first_alone, *turns[3:]]}
    [question] = questions_of(asked, tokenizer, layout=layout, turns="first", chat="template")
    assert question.gold == "0.84"


# --- layout messages ------------------------------------------------------------------------------


def test_a_template_may_write_the_start_token_and_needs_no_end_token(tokenizer):
    chat = with_changes(tokenizer, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    example = example_of(CHAT, chat, layout="messages")
    # All but "<|im_end|>\n".
    assert example.input_ids[:-1] == chat.apply_chat_template(CHAT["messages"]).input_ids[:-2]
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    example = example_of(CHAT, with_changes(tokenizer, chat_template=template), layout="messages")
    assert supervised_text(example, tokenizer) == "hello there</s>|0.84</s>"
    # An end-of-turn token that the tokenizer does not list.
    unlisted = with_changes(tokenizer, extra_special_tokens=[])
    example = example_of(CHAT, unlisted, layout="messages")
    assert supervised_text(example, tokenizer) == "hello there<|im_end|>|0.84<|im_end|>"
