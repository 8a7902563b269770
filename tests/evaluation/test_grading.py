"""Verification of what a model may write: mathematics, no answer, and answers that would take all time and memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

from cera_train.evaluation.grading import Candidate, Verdict, judge

RIGHT = Candidate("12", r"\frac{24}{2}", "")


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


def test_an_extracted_answer_decides_else_the_text():
    cases = {
        RIGHT: True,
        Candidate("12", "13", "the answer is 12"): False,
        Candidate("12", None, "So the answer is 12."): True,
        Candidate("12", None, "The final answer is $x = 12$. I hope it is correct."): True,
        Candidate("12", None, r"we get \[ 24/2 \]"): True,
        Candidate("12", None, "So the answer is 13, not 12. The answer is 13."): False,
        Candidate("12", None, "nothing at all"): False,
        Candidate("12", None, ""): False,
        Candidate("12", None, "the value is x^2 = 5 " * 50_000): False,
    }
    before = set(multiprocessing.active_children())
    assert judge(list(cases), seconds=20) == [Verdict(correct) for correct in cases.values()]
    assert judge([], seconds=20) == []
    assert set(multiprocessing.active_children()) <= before


def test_hostile_answers_are_wrong_and_the_others_go_on():
    """To replace a process takes longer than the time limit, which that must not count against the next answer."""
    hostile = ["9^{9^{9^{9}}}", "(((9!)!)!)!", "9" * 1_000_000, "(" * 20_000]
    pairs = [candidate for answer in hostile for candidate in (Candidate("12", answer, ""), RIGHT)]
    verdicts = judge(pairs, seconds=1)
    assert [verdict.correct for verdict in verdicts] == [False, True] * len(hostile)
    assert verdicts[0] == verdicts[2] == Verdict(False, "timeout")


def test_a_process_that_dies_or_has_no_memory_is_a_crash_and_the_others_go_on():
    crashes = [Deadly("12", "12", ""), Hungry("12", "12", ""), Candidate(r"\frac{0}{0}", "1", "")]
    verdicts = judge([candidate for crash in crashes for candidate in (crash, RIGHT)], seconds=20)
    assert verdicts[1::2] == [Verdict(True)] * 3
    assert [verdict.failure for verdict in verdicts[::2]] == [
        "crash: ProcessExpired: exit code 3",
        "crash: MemoryError",
        "crash: ValueError: Can't evaluate nan or zoo",
    ]


def test_processes_import_neither_torch_nor_transformers():
    code = "import sys; sys.argv[0] = 'cera-train'\n"
    code += "import cera_train.evaluation.grading, math_verify\n"
    code += "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
