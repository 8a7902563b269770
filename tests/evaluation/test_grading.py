"""Verification of what a model may write: mathematics, no answer, and answers that would take all time and memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest

from cera_train.evaluation.grading import Candidate, Verdict, Verifier


def box(answer: str, gold: str = "12") -> Candidate:
    return Candidate(gold, answer, "")


RIGHT = box(r"\frac{24}{2}")
WRONG = box("13")


class Deadly(Candidate):
    """Ends the process that reads its gold answer."""

    def __getattribute__(self, name):
        if name == "gold":
            os._exit(3)
        return super().__getattribute__(name)


class Hungry(Candidate):
    """Takes 2 GB to read its gold answer."""

    def __getattribute__(self, name):
        return str(len(bytearray(2**31))) if name == "gold" else super().__getattribute__(name)


def test_no_candidates_start_no_process():
    before = set(multiprocessing.active_children())
    with Verifier(workers=2) as verifier:
        assert list(verifier.verify([])) == []
        assert set(multiprocessing.active_children()) <= before


def test_processes_end_with_the_context_also_when_verdicts_are_left():
    before = set(multiprocessing.active_children())
    with Verifier(time_limit=10, workers=2) as verifier:
        next(verifier.verify([RIGHT] * 20))
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture(scope="module")
def verifier():
    with Verifier(time_limit=10, workers=1) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def impatient():
    with Verifier(time_limit=0.5, workers=2) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("So the answer is 12.", True),
        ("The final answer is $x = 12$. I hope it is correct.", True),
        (r"we get \[ 24/2 \]", True),
        ("So the answer is 13, not 12. The answer is 13.", False),
        ("nothing at all", False),
        ("", False),
    ],
)
def test_without_an_extracted_answer_the_text_decides(verifier, text, correct):
    assert list(verifier.verify([Candidate("12", None, text)])) == [Verdict(correct)]


def test_an_extracted_answer_outweighs_the_text(verifier):
    assert list(verifier.verify([Candidate("12", "13", "the answer is 12")])) == [Verdict(False)]


def test_a_gold_answer_that_cannot_be_compared_is_a_crash(verifier):
    verdicts = list(verifier.verify([box("1", gold=r"\frac{0}{0}"), RIGHT]))
    assert verdicts == [Verdict(False, "crash: ValueError: Can't evaluate nan or zoo"), Verdict(True)]


def test_verdicts_stream_in_order(verifier):
    candidates = [RIGHT, WRONG] * 50
    verdicts = verifier.verify(candidates)
    assert next(verdicts) == Verdict(True)
    assert [verdict.correct for verdict in verdicts] == [False, *[True, False] * 49]


def test_hostile_answers_are_wrong_and_the_others_go_on(impatient):
    """To replace a process takes longer than the time limit, which that must not count against the next answer."""
    hostile = {
        "tower": "9^{9^{9^{9}}}",
        "factorials": "(((9!)!)!)!",
        "digits": "9" * 1_000_000,
        "brackets": "(" * 20_000,
    }
    verdicts = list(impatient.verify([candidate for answer in hostile.values() for candidate in (box(answer), RIGHT)]))
    assert [verdict.correct for verdict in verdicts] == [False, True] * len(hostile)
    assert verdicts[0] == verdicts[2] == Verdict(False, "timeout")


def test_a_megabyte_of_text_is_no_answer(verifier):
    texts = ["the value is x^2 = 5 " * 50_000, "$" * 1_000_001]
    assert not any(verdict.correct for verdict in verifier.verify([Candidate("12", None, text) for text in texts]))


def test_a_process_that_dies_is_a_crash_and_the_others_go_on(verifier):
    verdicts = list(verifier.verify([RIGHT, Deadly("12", "12", ""), RIGHT]))
    assert verdicts == [Verdict(True), Verdict(False, "crash: ProcessExpired: exit code 3"), Verdict(True)]


def test_processes_have_a_memory_limit(verifier):
    verdicts = list(verifier.verify([Hungry("12", "12", ""), RIGHT]))
    assert verdicts == [Verdict(False, "crash: MemoryError"), Verdict(True)]


def test_a_long_multiplication_is_stopped(impatient):
    assert list(impatient.verify([box("9^{9^{9^{9}}}")])) == [Verdict(False, "timeout")]


def test_processes_import_neither_torch_nor_transformers():
    code = "import sys; sys.argv[0] = 'cera-train'\n"
    code += "import cera_train.evaluation.grading, math_verify\n"
    code += "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
