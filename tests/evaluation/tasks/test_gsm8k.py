"""GSM8K's answers: which number of a text is the answer, and when two numbers are equal."""

import pytest

from cera_train.evaluation.tasks.gsm8k import find_number, gold_number, same_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 72\n\nQuestion: 5 + 5?\nAnswer: 10\n#### 10", "72"),
        ("#### $1,234.50", "1234.50"),
        ("#### -$5", "-5"),
        ("it was 3 #### nothing\n4", None),
        ("The answer is $18.50.", "18.50"),
        ("It falls to −2", "-2"),
        ("$10-$5", "5"),
        ("", None),
    ],
)
def test_answer_is_the_number_after_the_first_mark_else_the_last(text, answer):
    assert find_number(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("18.0", "18", True),
        ("0.1", "0.10000000000000001", False),
        ("1000000000000000000000000000001", "1000000000000000000000000000000", False),
        ("1e999999999999999999999", "5", False),
        ("9" * 100_000, "9" * 100_000, True),
    ],
)
def test_numbers_are_compared_as_decimals(answer, reference, equal):
    assert same_number(answer, reference) == same_number(reference, answer) == equal


def test_a_megabyte_of_text_is_read_at_once():
    assert find_number("1," * 500_000) == "1"
    assert find_number("-$" * 500_000) is None
    assert len(find_number("9" * 1_000_000)) == 1_000_000


def test_gold_is_the_normalised_number_after_the_mark():
    assert (
        gold_number({"question": "?", "answer": "She has 9 * 2 = <<9*2=18>>18.\n#### 18"}) == "18"
    )
    assert gold_number({"question": "?", "answer": "#### -$10.50"}) == "-10.50"
