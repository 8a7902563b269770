r"""MATH's answers: the box, and both graders on one table of pairs, judged by hand."""

import pytest

from cera_train.evaluation.grading import AnswerPair, Verdict, _verdict
from cera_train.evaluation.tasks.math import find_box, gold_latex, plain_latex, same_latex

# answer, gold, exact?, verified?
PAIRS = [
    # fractions
    (r"\frac12", r"\frac{1}{2}", True, True),
    (r"1/2", r"\frac{1}{2}", True, True),
    (r"0.5", r"\frac{1}{2}", False, True),
    (r"\frac{1}{2}", r"-\frac{1}{2}", False, False),
    # decimals
    (r".5", r"0.5", True, True),
    # mixed numbers
    (r"1\frac{1}{2}", r"\frac{3}{2}", False, True),
    # thousands separators
    (r"1,000", r"1000", True, True),
    (r"10,\!000", r"10000", True, True),
    (r"1,234", r"1, 234", False, False),
    # units, currency, percentages, degrees
    (r"5\text{ cm}", r"5", True, True),
    (r"\$5", r"5", True, True),
    (r"50%", r"50\%", True, True),
    (r"90^\circ", r"90", True, True),
    # negative numbers
    (r"- 3", r"-3", True, True),
    # surds
    (r"\sqrt3", r"\sqrt{3}", True, True),
    # expressions
    (r"(x+1)^2", r"x^2+2x+1", False, True),
    # equations
    (r"x=5", r"5", True, True),
    (r"x=5", r"y=5", True, True),  # as published: the rule drops a short left side
    # sets, lists, intervals
    (r"\left\{1,2\right\}", r"\{1,2\}", True, True),
    (r"2,1", r"1, 2", False, True),
    (r"3", r"3, 4", False, False),
    (r"(-\infty, 3) \cup (5, \infty)", r"(-\infty,3)\cup(5,\infty)", True, True),
    # tuples, vectors, matrices
    (r"(1,2)", r"(1, 2)", True, True),
    (r"(2,1)", r"(1,2)", False, False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True, True),
    # words, choices, times, bases
    (r"even", r"\text{even}", True, True),
    (r"\textbf{(C)}", r"(C)", True, True),
    (r"6:30\text{ p.m.}", r"6:30", True, True),
    (r"11_{7}", r"11_8", False, False),
    # unicode
    (r"−3", r"-3", False, True),
    (r"三", r"\text{三}", True, True),
    # garbage, empty, very long
    (r"", r"0", False, False),
    (r"\frac{", r"3", False, False),
    # If math-verify cannot read the gold answer, the exact rule decides.
    (r"? !", r"?!", True, True),
    ("9" * 500, "9" * 500, True, True),
]


def test_both_graders_on_the_table():
    for answer, reference, exact, verified in PAIRS:
        assert same_latex(answer, reference) == same_latex(reference, answer) == exact, answer
        assert _verdict(AnswerPair(reference, answer, "")) == Verdict(verified), answer
        for text in (answer, reference):
            assert plain_latex(plain_latex(text)) == plain_latex(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So the answer is $\boxed{12}$.", "12"),
        (
            r"\boxed{\frac{\sqrt{a^{2}+1}}{\frac{1}{2}}} and more }",
            r"\frac{\sqrt{a^{2}+1}}{\frac{1}{2}}",
        ),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        ("\\boxed{\n5\n}", "5"),
        (r"$\boxed 3$ apples", "3"),
        (r"\boxed\frac12$", r"\frac12"),
        ("we put the box in text: \\boxed{\\text{no}} Question: what is 1 + 1?", r"\text{no}"),
        (r"\boxed{1} and then \boxed{\frac{1}{2", None),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{}", None),
        ("the answer is 12", None),
    ],
)
def test_answer_is_the_last_box(text, answer):
    assert find_box(text) == answer


def test_a_megabyte_of_text_is_extracted_and_compared_at_once():
    assert find_box("{" * 1_000_000 + r"\boxed{2}") == "2"
    assert find_box(r"\boxed{" * 140_000) is None
    for filler in (" ", "~", ".", " .", "$", "1,", "{}", r"\ ", r"\,", "9", "x=", r"\frac{"):
        assert not same_latex(filler * 200_000 + "x", "2")
    assert not same_latex(r"\frac{" * 160_000, r"\text{" * 160_000)


def test_gold_is_the_column_answer_or_the_box_of_the_solution():
    assert (
        gold_latex(
            {"problem": "?", "solution": r"Since \boxed{1} ... \boxed{\frac12}.", "level": 3}
        )
        == r"\frac12"
    )
    assert gold_latex({"problem": "?", "solution": r"\boxed{1}", "answer": "2"}) == "2"
    assert gold_latex({"problem": "?", "solution": r"\boxed{1}", "answer": None}) == "1"
    assert gold_latex({"problem": "?", "answer": 2}) == "2"
    assert gold_latex({"problem": "?", "answer": r"$\boxed{3}$"}) == "3"
