"""Grades, scores and statistics by hand, enumeration and scipy; and verification of what a model
may write, such as answers that would take all time and memory."""

import itertools
import math
import multiprocessing
from concurrent.futures.process import BrokenProcessPool

import pytest
import scipy.stats
from hostile_answers import Deadly, Hungry

from cera_train.evaluation import grading
from cera_train.evaluation.evaluate import score
from cera_train.evaluation.grading import (
    LONGEST_SEGMENT,
    AnswerPair,
    Verdict,
    ending_of,
    grade_all,
    is_loop,
    judge,
)
from cera_train.evaluation.statistics import (
    accuracy_interval,
    bootstrap_interval,
    holm,
    paired_bootstrap,
    pass_at_k,
    sign_flip,
)
from cera_train.evaluation.tasks import gsm8k, logistic_map
from cera_train.evaluation.tasks import math as math_task
from cera_train.runs.evaluation_folder import (
    ENDINGS,
    AccuracyResult,
    Generation,
    Problem,
    ending_shares,
)

pytest_plugins = ("evaluated_runs",)


RIGHT = AnswerPair("12", r"\frac{24}{2}", "")


def answer(problem: str, text: str, sample: int = 0, truncated: bool = False) -> Generation:
    return Generation(problem, sample, text, len(text), truncated)


def test_both_graders_count_side_by_side(one_verifier):
    problems = [Problem(name, "?", "?", r"\frac{1}{2}") for name in "abcde"]
    answers = [
        answer("a", r"so \boxed{\frac12}"),  # written alike
        answer("b", r"so \boxed{0.5}"),  # equal, written otherwise
        answer("c", r"so \boxed{2}"),
        answer("d", r"so the answer is $\frac{1}{2}$."),  # no box: math-verify looks at the text
        answer("e", r"so \boxed{\frac{1", truncated=True),
    ]
    grades = grade_all(math_task.TASK, problems, answers)
    assert [grade.exact for grade in grades] == [True, False, False, False, False]
    assert [grade.verified for grade in grades] == [True, True, False, True, False]
    assert [grade.answer for grade in grades] == [r"\frac12", "0.5", "2", None, None]
    assert [grade.ending for grade in grades] == ["right", "right", "wrong", "right", "truncated"]
    scores = score(math_task.TASK, problems, answers, grades)
    assert list(scores.accuracies) == ["exact/pass@1", "verified/pass@1"]
    assert [scores.details[key] for key in scores.accuracies] == [1 / 5, 3 / 5]
    assert [scores.endings[name] for name in ENDINGS] == [3 / 5, 1 / 5, 0, 1 / 5, 0]
    assert (scores.truncated, scores.no_answer, scores.grader_failures) == (1, 2, 0)
    lower, upper = scores.accuracies["verified/pass@1"]
    assert lower < 3 / 5 < upper


SENTENCE = "She has 3 apples left. "
LONG = "".join(f"{n} and then " for n in range(80))
"""Over 900 characters, no part of which repeats."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE * 3, True),
        (f"{SENTENCE * 5}She has 3 ap", True),  # cut in the middle of the segment
        (LONG * 3, True),
        ("ab" * 500_000 + "c", False),
        (LONG, False),
        (f"{SENTENCE * 5}So the answer is 18.", False),  # it got out of it
        ("0.84, 0.84, 0.84, 0.84, 0.84, 0.84", False),  # too short
        ("x" * (LONGEST_SEGMENT + 1) + "y", False),
    ],
)
def test_a_tail_of_one_segment_is_a_loop(text, expected):
    assert is_loop(text) == expected


TRUTH = "0.84, 0.47, 0.87, 0.40, 0.84, 0.47"
CYCLE = ", ".join(["0.51", "0.80"] * 8)


@pytest.mark.parametrize(
    ("task", "gold", "text", "truncated", "expected"),
    [
        (gsm8k, "18", "I do not know.", False, "wrong"),
        (gsm8k, "18", LONG, True, "truncated"),
        (gsm8k, "18", SENTENCE * 9, True, "loop"),
        (gsm8k, "18", "#### 18\n" + "Question: " * 9, True, "right"),
        (logistic_map, TRUTH, TRUTH, False, "right"),
        # The answer also loops, but because it collapsed.
        (logistic_map, TRUTH, "0.84, 0.60" + ", 0.60" * 20, True, "collapsed"),
        (logistic_map, TRUTH, "0.84, 0.61" + ", 0.61, 0.84" * 10, True, "loop"),
        # It repeats itself as the truth does.
        (logistic_map, CYCLE, "0.52, 0.80, " + CYCLE[12:], False, "wrong"),
    ],
)
def test_how_an_answer_ends(task, gold, text, truncated, expected):
    problem = Problem("a", "?", "?", gold, decimals=2)
    given = answer("a", text, truncated=truncated)
    assert ending_of(problem, given, task.TASK.grade(problem, given)) == expected


def test_shares_of_endings_are_unknown_where_one_is():
    shares = {"right": 0.25, "wrong": 0.25, "loop": 0.5, "truncated": 0.0, "collapsed": 0.0}
    assert AccuracyResult(**ending_shares(["right", "loop", "loop", "wrong"])).endings == shares
    assert ending_shares([]) == AccuracyResult(**{"ending/right": 1.0}).endings == {}


def test_an_extracted_answer_decides_else_the_text_and_a_crash_stops_no_other():
    cases = [
        (RIGHT, Verdict(True)),
        (Deadly("12", "12", ""), Verdict(False, "crash: ProcessExpired: exit code 3")),
        (AnswerPair("12", "13", "the answer is 12"), Verdict(False)),
        (Hungry("12", "12", ""), Verdict(False, "crash: MemoryError")),
        (
            AnswerPair("12", None, "The final answer is $x = 12$. I hope it is correct."),
            Verdict(True),
        ),
        (
            AnswerPair(r"\frac{0}{0}", "1", ""),
            Verdict(False, "crash: ValueError: Can't evaluate nan or zoo"),
        ),
        (AnswerPair("12", None, r"we get \[ 24/2 \]"), Verdict(True)),
        (AnswerPair("12", None, "So the answer is 13, not 12. The answer is 13."), Verdict(False)),
        (AnswerPair("12", None, ""), Verdict(False)),
        (AnswerPair("12", None, "the value is x^2 = 5 " * 50_000), Verdict(False)),
    ]
    before = set(multiprocessing.active_children())
    assert judge([pair for pair, _ in cases], seconds=60) == [verdict for _, verdict in cases]
    assert judge([], seconds=60) == []
    assert set(multiprocessing.active_children()) <= before


def test_what_a_broken_pool_left_is_judged_by_another(monkeypatch):
    """pebble gives up where a process ends before it is known which answer that process took, a
    moment that no test can hit."""
    pools = []

    def breaks_after_one(pairs, seconds):
        pools.append(len(pairs))
        yield Verdict(True)
        if len(pairs) > 1:
            raise BrokenProcessPool

    monkeypatch.setattr(grading, "_judge_in_order", breaks_after_one)
    assert judge([RIGHT] * 3) == [Verdict(True)] * 3
    assert pools == [3, 2, 1]
    with pytest.raises(BrokenProcessPool):
        judge([RIGHT] * 5)


def test_hostile_answers_are_wrong_and_the_others_go_on():
    """To replace a process takes longer than the time limit, which that must not count against the
    next answer."""
    hostile = ["9^{9^{9^{9}}}", "9" * 1_000_000, "(" * 20_000]
    pairs = []
    for answer in hostile:
        pairs += [AnswerPair("12", answer, ""), RIGHT]
    verdicts = judge(pairs, seconds=1)
    assert [verdict.correct for verdict in verdicts] == [False, True] * len(hostile)
    assert verdicts[0] == Verdict(False, "timeout")


@pytest.mark.parametrize("test", [sign_flip, paired_bootstrap])
def test_runs_on_different_problems_are_refused(test):
    with pytest.raises(ValueError, match="zip"):
        test([True, False], [True, False, True])


ACCURACY = [1.0] * 120 + [0.0] * 280


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-15
            )


def test_bootstrap_interval_of_an_accuracy_approaches_the_normal_one():
    half = scipy.stats.norm.ppf(0.975) * math.sqrt(0.3 * 0.7 / 400)
    assert bootstrap_interval(ACCURACY) == pytest.approx((0.3 - half, 0.3 + half), abs=3e-3)


@pytest.mark.parametrize("problems", [1, 7, 1319])
def test_the_interval_of_none_or_all_problems_is_clopper_and_pearsons(problems):
    """Resampling would give a point, which is not how sure the accuracy is."""
    for right in (0, problems):
        expected = scipy.stats.binomtest(right, problems).proportion_ci(0.95, method="exact")
        values = [1.0] * right + [0.0] * (problems - right)
        assert accuracy_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert accuracy_interval(ACCURACY) == bootstrap_interval(ACCURACY)


def test_paired_bootstrap_uses_the_pairing():
    """Two runs that differ on 20 of 400 problems: their intervals overlap widely, the difference is
    sure."""
    second = [1.0] * 140 + [0.0] * 260
    difference = paired_bootstrap(ACCURACY, second)
    assert bootstrap_interval(ACCURACY)[1] > bootstrap_interval(second)[0]
    half = 1.96 * math.sqrt(0.05 * 0.95 / 400)
    assert difference.difference == pytest.approx(0.05)
    assert (difference.lower, difference.upper) == pytest.approx(
        (0.05 - half, 0.05 + half), abs=3e-3
    )


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
