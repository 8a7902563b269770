"""Several data sets as one: how many rows of each, which ones, in what order; what they share with
runs on one of them."""

import re
from collections import Counter

import pytest
from examples import CONVERSATION, texts_of, with_changes

from cera_train.data.prepare import (
    held_out_questions,
    prepare_data,
    prepare_evaluation,
    training_questions,
)
from cera_train.data.sources import drawn_rows, interleaved, rows_of_parts
from cera_train.settings.data import DataConfig, MixPart
from cera_train.settings.run import check_objective
from cera_train.settings.training import ObjectiveKind

pytest_plugins = ["examples"]
pytestmark = pytest.mark.usefixtures("cache")

TEXT = {"prompt": "{question}", "completion": " {answer}"}

REWRITES = (
    "{% for message in messages %}{{ message.role }}: "
    "{{ message.content if loop.last or message.role == 'user' else '...' }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template that leaves earlier answers out."""


@pytest.fixture
def part(write_jsonl):
    """part("a", 30, weight=1) -> a part of 30 rows in a.jsonl, whose last two are held out"""

    def part(name: str, size: int, **settings) -> MixPart:
        rows = [{"question": f"{name}{row}?", "answer": f"{name} is {row}"} for row in range(size)]
        return MixPart(
            **{"train_files": [str(write_jsonl(f"{name}.jsonl", rows))], "eval_rows": 2} | settings
        )

    return part


def mix(*parts: MixPart, **settings) -> DataConfig:
    return DataConfig(**TEXT | {"mix": list(parts)} | settings)


def row_texts(name: str, numbers) -> list[str]:
    return [f"{name}{row}? {name} is {row}" for row in numbers]


@pytest.mark.parametrize(
    ("available", "weights", "total", "rows"),
    [
        ([30, 7], [0.7, 0.3], None, [16, 7]),  # as many as without repeating a part: 23.3
        ([99, 99, 99], [0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([5, 5], [1, 3], 100, [25, 75]),  # repeated
        ([30, 7], [None, None], None, [30, 7]),
        ([30, 10], [None, None], 400, [30, 10]),
    ],
)
def test_rows_are_divided_by_largest_remainder(available, weights, total, rows):
    assert rows_of_parts(available, weights, total) == rows


def test_a_part_is_used_up_before_any_row_repeats():
    assert drawn_rows(5, 5, "0 0") == [0, 1, 2, 3, 4]
    counts = Counter(drawn_rows(5, 13, "0 0"))
    assert sorted(counts.values()) == [2, 2, 3, 3, 3]
    assert drawn_rows(100, 40, "0 0") == drawn_rows(100, 40, "0 0") != drawn_rows(100, 40, "1 0")
    assert len(set(drawn_rows(100, 40, "0 0"))) == 40


def test_every_part_is_spread_evenly():
    parts = [range(70), range(100, 120), range(200, 210)]
    rows = interleaved(parts)
    assert sorted(rows) == [row for part in parts for row in part]
    for end in range(1, 101):
        shares = Counter(row // 100 for row in rows[:end])
        assert all(
            abs(shares[part] - end * share) <= 1 for part, share in enumerate((0.7, 0.2, 0.1))
        )


def test_a_mix_trains_on_its_shares_and_evaluates_on_all_parts(part, tokenizer):
    data = prepare_data(mix(part("a", 32, weight=2), part("b", 7, weight=1)), tokenizer)
    trained = texts_of(data.train, tokenizer)
    assert {*row_texts("b", range(5))} <= {*trained}
    assert len({*trained} & {*row_texts("a", range(30))}) == 10
    assert len(trained) == len(data.train) == 15
    assert sorted(texts_of(data.evaluation, tokenizer)) == [
        *row_texts("a", (30, 31)),
        *row_texts("b", (5, 6)),
    ]
    lengths = dict(zip(trained, data.train.lengths, strict=True))
    total = sum(lengths.values())
    of_b = sum(length for text, length in lengths.items() if text.startswith("b"))
    assert data.mix == [
        f"a.jsonl: 10 sequences an epoch, of 30, with {1 - of_b / total:.2%} of the tokens",
        f"b.jsonl: 5 sequences an epoch, of 5, with {of_b / total:.2%} of the tokens",
    ]


def test_rows_of_several_sequences_are_drawn_as_rows(part, write_jsonl, tokenizer):
    chat = with_changes(tokenizer, chat_template=REWRITES)
    roles = ("user", "assistant") * 2
    chats = [
        {"messages": [{"role": role, "content": f"{role} {number}"} for role in roles]}
        for number in range(9)
    ]
    file = str(write_jsonl("chats.jsonl", chats))
    chats = MixPart(train_files=[file], layout="messages", weight=1, eval_rows=1)
    config = mix(chats, part("a", 9, weight=1), train_rows=6)
    train = prepare_data(config, chat).train
    texts = texts_of(train, chat)
    sequences = Counter(re.search(r"\d", text)[0] for text in texts if text.startswith("user"))
    assert [*sequences.values()] == [2] * 3
    assert len(texts) == 3 * 2 + 3


def test_an_epoch_asks_its_share_of_each_part_without_prompts_that_are_too_long(
    part, write_jsonl, tokenizer
):
    rows = [{"question": "b" * (1 + row % 2 * 99), "answer": "it " * 99} for row in range(14)]
    half = MixPart(train_files=[str(write_jsonl("b.jsonl", rows))], weight=1, eval_rows=2)
    config = mix(part("a", 32, weight=1), half, max_length=40, allow_overlap=True)
    questions = training_questions(config, tokenizer)
    assert Counter(question.prompt[0] for question in questions) == {"a": 6, "b": 6}
    assert ("b", ("it " * 99).strip()) in [(each.prompt, each.gold) for each in questions]
    assert "b" * 100 not in [each.prompt for each in held_out_questions(config, tokenizer)]


def test_a_part_that_only_holds_rows_out_needs_no_prompt(part, write_jsonl, tokenizer):
    documents = str(write_jsonl("documents.jsonl", [{"text": "one"}] * 3))
    watched = MixPart(
        train_files=[documents], prompt="", completion="{text}", weight=0, eval_rows=2
    )
    config = mix(part("a", 32, weight=1), watched, allow_overlap=True)
    check_objective(ObjectiveKind.grpo, config)
    assert {each.prompt[0] for each in training_questions(config, tokenizer)} == {"a"}


def test_a_part_has_its_own_layout_and_templates_or_those_of_data(part, write_jsonl, tokenizer):
    chats = str(write_jsonl("chats.jsonl", [CONVERSATION, CONVERSATION]))
    one = MixPart(train_files=[chats], eval_rows=0, layout="conversations")
    two = part("b", 3, prompt="Q: {question}", completion=" A: {answer}")
    computed = MixPart(layout="logistic_map", train_rows=1, eval_rows=1)
    trained = texts_of(
        prepare_data(mix(one, two, part("a", 3), computed, chat="plain"), tokenizer).train,
        tokenizer,
    )
    chat = "User: hello\nAssistant: hello there"
    assert {chat, "Q: b0? A: b is 0", *row_texts("a", [0])} < {*trained}
    assert any(text.startswith("Question: x' = 3.5 x (1 - x).") for text in trained)


def test_mixes_have_different_digests_and_a_part_shares_the_cache_with_a_run_on_it_alone(
    part, tokenizer, reads
):
    a = part("a", 32, weight=1)
    b = part("b", 7, weight=1)
    alone = prepare_data(DataConfig(**TEXT, train_files=a.train_files, eval_rows=2), tokenizer)
    assert {*reads} == {"a.jsonl"}
    other_weight = mix(a, part("b", 7, weight=2))
    configs = [mix(a, b), other_weight, mix(b, a), mix(a, b, train_rows=7), mix(a)]
    mixes = [prepare_data(config, tokenizer).train.digest for config in configs]
    assert len({alone.train.digest, *mixes}) == 6
    assert reads == ["a.jsonl"] * 3 + ["b.jsonl"] * 3  # to count the rows, and once for each split
    assert prepare_data(mix(a, b), tokenizer).train.digest == mixes[0]


def test_perplexities_compare_across_shares_and_with_a_run_on_the_only_held_out_part(
    part, tokenizer
):
    def held_out(*parts: MixPart, **settings) -> str:
        return prepare_evaluation(mix(*parts, **settings), tokenizer).digest

    a = part("a", 12, weight=1)
    b = part("b", 7, weight=1)
    silent = part("b", 7, weight=1, eval_rows=0)
    assert held_out(a, b) == held_out(part("a", 12, weight=3, train_rows=5), b, train_rows=3)
    others = (part("c", 7, weight=1), part("b", 7, weight=1, prompt="{answer}"), silent)
    assert len({held_out(a, b), *(held_out(a, other) for other in others)}) == 4
    alone = DataConfig(**TEXT, train_files=a.train_files, eval_rows=2)
    assert prepare_evaluation(alone, tokenizer).digest == held_out(a, silent)
