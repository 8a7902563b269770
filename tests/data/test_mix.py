"""Several data sets as one: how many rows of each, which, in what order; what they share with runs on one alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from examples import CONVERSATION

from cera_train.common.errors import UserError
from cera_train.common.settings import flatten, to_plain
from cera_train.data.mix import PartRows, describe_parts, drawn_rows, interleaved, rows_of_parts
from cera_train.data.prepare import TokenizedRows, prepare_data, prepare_evaluation
from cera_train.data.sources import check_data
from cera_train.settings.data import DataConfig, MixPart, evaluation_rows

pytest_plugins = ["row_fixtures"]
pytestmark = pytest.mark.usefixtures("cache")

TEXT = {"prompt": "{question}", "completion": " {answer}"}


@pytest.fixture
def part(write_jsonl):
    """part("a", 30, weight=1) -> a part of 30 rows in a.jsonl, whose last two are held out"""

    def part(name: str, size: int, **settings) -> MixPart:
        rows = [{"question": f"{name}{row}?", "answer": f"{name} is {row}"} for row in range(size)]
        return MixPart(**{"files": [str(write_jsonl(f"{name}.jsonl", rows))], "eval_rows": 2} | settings)

    return part


def mix(*parts: MixPart, **settings) -> DataConfig:
    return DataConfig(**TEXT | {"mix": list(parts)} | settings)


def texts(rows: TokenizedRows, tokenizer) -> list[str]:
    texts = [tokenizer.decode(rows.tokens("input_ids", row).to_pylist()) for row in range(len(rows))]
    return [text.removeprefix("<s>").removesuffix("</s>") for text in texts]


def row_texts(name: str, numbers) -> list[str]:
    return [f"{name}{row}? {name} is {row}" for row in numbers]


# --- how many rows of each part --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "weights", "total", "rows"),
    [
        ([3000, 254], [3, 1], None, [762, 254]),  # as many as repeat no part
        ([30, 7], [0.7, 0.3], None, [16, 7]),  # 23.3 rows
        ([10, 10, 10], [1, 1, 1], 10, [4, 3, 3]),  # of equal remainders, the first part's
        ([99, 99, 99], [0.1, 0.2, 0.7], 10, [1, 2, 7]),  # exact: as floats they add up to less than 1
        ([99, 99, 99], [1, 1, 4], 10, [2, 2, 6]),  # remainders 0.67, 0.67, 0.67 for two rows: the first two parts'
        ([5, 5], [1, 3], 100, [25, 75]),  # repeated
        ([5, 5], [0, 3], None, [0, 5]),
        ([30, 7], [None, None], None, [30, 7]),
        ([30, 10], [None, None], 20, [15, 5]),
        ([30, 10], [None, None], 400, [30, 10]),
    ],
)
def test_rows_are_shared_out_by_largest_remainder(available, weights, total, rows):
    assert rows_of_parts(available, weights, total) == rows


def test_a_part_is_repeated_whole_before_any_row_comes_again():
    assert drawn_rows(5, 5, "0 0") == [0, 1, 2, 3, 4]
    counts = Counter(drawn_rows(5, 13, "0 0"))
    assert sorted(counts.values()) == [2, 2, 3, 3, 3]
    assert drawn_rows(100, 40, "0 0") == drawn_rows(100, 40, "0 0") != drawn_rows(100, 40, "1 0")
    assert len(set(drawn_rows(100, 40, "0 0"))) == 40


def test_every_part_is_spread_evenly():
    rows = interleaved([range(70), range(100, 120), range(200, 210)])
    assert sorted(rows) == [*range(70), *range(100, 120), *range(200, 210)]
    for end in range(1, 101):
        shares = Counter(row // 100 for row in rows[:end])
        assert all(abs(shares[part] - end * share) <= 1 for part, share in enumerate((0.7, 0.2, 0.1)))


# --- the rows --------------------------------------------------------------------------------------------------------


def test_a_mix_trains_on_its_shares_and_evaluates_on_all_parts(part, tokenizer):
    data = prepare_data(mix(part("a", 32, weight=2), part("b", 7, weight=1)), tokenizer)
    trained = texts(data.train, tokenizer)
    assert {*row_texts("b", range(5))} <= {*trained}
    assert len({*trained} & {*row_texts("a", range(30))}) == 10
    assert len(trained) == len(data.train) == 15
    assert sorted(texts(data.evaluation, tokenizer)) == [*row_texts("a", (30, 31)), *row_texts("b", (5, 6))]
    lengths = dict(zip(trained, data.train.column("length"), strict=True))
    first, second = data.parts
    assert (first.title, first.available, first.rows, first.eval_rows) == ("a.jsonl", 30, 10, 2)
    assert (second.title, second.available, second.rows, second.eval_rows) == ("b.jsonl", 5, 5, 2)
    assert second.tokens == sum(length for text, length in lengths.items() if text.startswith("b"))
    assert first.tokens + second.tokens == sum(lengths.values()) == data.train.counts.tokens
    assert data.train.counts.supervised_tokens == sum(data.train.column("supervised"))


@pytest.mark.parametrize(
    ("first", "second", "settings", "trained", "eval_rows"),
    [
        ({}, {}, {}, {"a": range(10), "b": range(5)}, [2, 2]),
        ({"rows": 3}, {"eval_rows": 0}, {}, {"a": range(3), "b": range(7)}, [2, 0]),
        ({"weight": 1}, {"weight": 0}, {}, {"a": range(10)}, [2, 2]),
        ({"weight": 1}, {"weight": 2}, {"train_rows": 30}, {"a": range(10), "b": [*range(5)] * 4}, [2, 2]),
    ],
)
def test_rows_weights_and_eval_rows_choose_the_rows(part, tokenizer, first, second, settings, trained, eval_rows):
    data = prepare_data(mix(part("a", 12, **first), part("b", 7, **second), **settings), tokenizer)
    expected = [text for name, numbers in trained.items() for text in row_texts(name, numbers)]
    assert sorted(texts(data.train, tokenizer)) == sorted(expected)
    assert [part.eval_rows for part in data.parts] == eval_rows
    assert len(data.evaluation) == sum(eval_rows)


def test_a_part_has_a_layout_and_templates_of_its_own_or_those_of_data(part, write_jsonl, tokenizer):
    chats = str(write_jsonl("chats.jsonl", [CONVERSATION, CONVERSATION]))
    one = MixPart(files=[chats], eval_rows=0, layout="conversations")
    two = part("b", 3, prompt="Q: {question}", completion=" A: {answer}")
    trained = texts(prepare_data(mix(one, two, part("a", 3)), tokenizer).train, tokenizer)
    chat = "User: hello\nAssistant: hello there"
    assert sorted(trained) == sorted([chat, chat, "Q: b0? A: b is 0", *row_texts("a", [0])])


def test_the_seed_draws_the_rows_and_repeats_them_exactly(part, tokenizer):
    def rows(seed: int) -> tuple[str, list[str]]:
        config = mix(part("a", 40, weight=1), part("b", 7, weight=1), mix_seed=seed)
        data = prepare_data(config, tokenizer)
        return data.train.digest, texts(data.train, tokenizer)

    assert rows(0) == rows(0)
    assert rows(0)[0] != rows(1)[0]
    assert {*rows(0)[1]} != {*rows(1)[1]}


def test_two_mixes_share_no_digest_and_a_part_shares_the_cache_with_a_run_on_it_alone(part, tokenizer, reads):
    a, b = part("a", 32, weight=1), part("b", 7, weight=1)
    alone = prepare_data(DataConfig(**TEXT, train_files=a.files, eval_rows=2), tokenizer)
    assert {*reads} == {"a.jsonl"}
    configs = [mix(a, b), mix(a, part("b", 7, weight=2)), mix(b, a), mix(a, b, train_rows=7), mix(a)]
    mixes = [prepare_data(config, tokenizer).train.digest for config in configs]
    assert len({alone.train.digest, *mixes}) == 6
    assert reads == ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]  # once for each split
    assert prepare_data(mix(a, b), tokenizer).train.digest == mixes[0]


def test_the_evaluation_alone_is_that_of_the_run_and_its_first_rows_are_of_every_part(part, tokenizer):
    config = mix(part("a", 12, eval_rows=6), part("b", 7))
    whole = prepare_data(config, tokenizer).evaluation
    assert prepare_evaluation(config, tokenizer).digest == whole.digest
    some = texts(prepare_evaluation(config, tokenizer, limit=4), tokenizer)
    assert some == texts(whole, tokenizer)[:4]
    assert Counter(text[0] for text in some) == {"a": 3, "b": 1}


def test_a_part_is_described_with_both_shares():
    small = PartRows("b.jsonl", 1, 200, 500, 50_000, 0)
    assert describe_parts([PartRows("a.jsonl", 3, 3000, 1500, 150_000, 1319), small]) == [
        "a.jsonl: 1,500 of 3,000 rows, 150,000 tokens: 75.00% of the rows (weight 75.00%), 75.00% of the tokens; 1,319 "
        "rows evaluate",
        "b.jsonl: 500 rows, 200 repeated 2.50 times, 50,000 tokens: 25.00% of the rows (weight 25.00%), 25.00% of the "
        "tokens; 0 rows evaluate",
    ]


# --- what is comparable ----------------------------------------------------------------------------------------------


def rows_that_evaluate(config: DataConfig) -> tuple:
    return evaluation_rows(flatten({"data": to_plain(config)}))


def test_shares_change_no_evaluation_rows(part):
    a, b, small = part("a", 12, weight=1), part("b", 7, weight=1), part("c", 7, weight=1)
    other = mix(part("a", 12, weight=3, rows=5), b, train_rows=3, mix_seed=1)
    assert rows_that_evaluate(mix(a, b)) == rows_that_evaluate(other)
    assert rows_that_evaluate(mix(a, b)) != rows_that_evaluate(mix(a, small))
    assert rows_that_evaluate(mix(a, b)) != rows_that_evaluate(mix(a, part("b", 7, weight=1, prompt="{answer}")))


def test_a_mix_that_evaluates_one_part_compares_with_a_run_on_it_alone(part):
    alone = DataConfig(**TEXT, train_files=part("a", 12).files, eval_rows=2)
    replay = mix(part("a", 12, weight=9), part("b", 7, weight=1, eval_rows=0))
    assert rows_that_evaluate(replay) == rows_that_evaluate(alone)


# --- mistakes --------------------------------------------------------------------------------------------------------

A = MixPart(files=["a.jsonl"], weight=1.0, eval_rows=1)


@pytest.mark.parametrize(
    ("parts", "settings", "line"),
    [
        ([], {}, "data.mix=[] has no parts: name some"),
        ([A], {"path": "org/rows"}, "data.path=org/rows beside data.mix: name it in a part, or leave out one"),
        ([A, MixPart(files=["b.jsonl"], eval_rows=1)], {}, "data.mix.1.weight is missing, and other parts have wei"),
        ([A, MixPart(path="org/rows", weight=-0.5)], {}, "data.mix.1.weight=-0.5 must be a number of at least 0."),
        ([MixPart(path="org/rows", weight=0.0)], {}, "data.mix: the weights add up to 0. Raise one."),
        ([A, MixPart(weight=1.0)], {}, "data.mix.1 has neither path nor files: name local files or a Hub data set."),
        ([A, MixPart(files=["b.jsonl"], weight=1.0)], {}, "data.mix.1.files without data.mix.1.eval_files: name eval"),
        ([A], {"prompt": None}, "data.mix.0.layout=text needs data.mix.0.prompt and data.mix.0.completion, such as"),
        ([A], {"layout": "logistic_map", "eval_rows": 2}, "data.mix.0 names rows, but data.layout=logistic_map comput"),
        ([MixPart(files=["a.jsonl"], eval_rows=0)], {}, "data.mix.0.eval_rows=0: no rows to evaluate on. Raise one."),
        ([MixPart(files=["a.jsonl"], rows=0, eval_rows=1)], {}, "data.mix.0.rows=0 must be positive."),
    ],
)
def test_a_mix_of_another_shape_is_refused_before_anything_is_read(parts, settings, line):
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        mix(*parts, **settings)


def test_mistakes_in_the_rows_of_a_part_name_its_settings(part, write_jsonl, tokenizer):
    no_column = part("b", 7, prompt="{query}")
    line = "b.jsonl:1: column 'query' (named in data.mix.1.prompt) is missing; its columns are question, answer."
    for check in (check_data, lambda config: prepare_data(config, tokenizer)):
        with pytest.raises(UserError, match=re.escape(line)):
            check(mix(part("a", 7), no_column))
    with pytest.raises(UserError, match=r"^data.mix.1.files=no.jsonl: cannot read the file"):
        check_data(mix(part("a", 7), MixPart(files=["no.jsonl"], eval_rows=1)))
    silent = str(write_jsonl("silent.jsonl", [{"question": "a", "answer": ""}] * 3))
    with pytest.raises(UserError, match=r"^data.mix.1.files=\[.*silent.jsonl\]: no training rows are left: 2 read, 2"):
        prepare_data(mix(part("a", 7), MixPart(files=[silent], eval_rows=1)), tokenizer)
    with pytest.raises(UserError, match=r"^data.mix.1.eval_rows=9 leaves nothing to train on: data.mix.1.files="):
        prepare_data(mix(part("a", 7), part("b", 7, eval_rows=9)), tokenizer)


def test_a_prompt_that_one_part_evaluates_and_another_trains_is_refused(part, tokenizer):
    rows = part("a", 9)
    both = MixPart(files=rows.files, eval_files=rows.files, weight=None)
    line = r"^data.mix.1.eval_files=\[.*a.jsonl\]: 9 of 9 evaluation prompts are also training prompts, so the perpl"
    with pytest.raises(UserError, match=line):
        prepare_data(mix(part("b", 7), both), tokenizer)
    assert prepare_data(mix(part("b", 7), both, allow_overlap=True), tokenizer).shared_prompts == 9


def test_a_run_alone_without_evaluation_rows_is_refused(part):
    with pytest.raises(UserError, match=r"data.eval_rows=0: no rows to evaluate on. Raise one"):
        check_data(DataConfig(**TEXT, train_files=part("a", 3).files, eval_rows=0))
