"""Answers that a grader's process does not survive. That process imports this file under its memory
limit, for which torch with CUDA is too large: the file imports none."""

import multiprocessing
import os
import time

from cera_train.evaluation.grading import AnswerPair


class Deadly(AnswerPair):
    """Ends the grader's process that reads its gold answer, not the one that prints a failure."""

    def __getattribute__(self, name):
        if name == "gold" and multiprocessing.parent_process():
            # pebble gives up on all answers where a process ends before it has read which answer
            # that process took: a moment, but a long one on a busy machine.
            time.sleep(2)
            os._exit(3)
        return super().__getattribute__(name)


class Hungry(AnswerPair):
    """Takes 2 GB to read its gold answer."""

    def __getattribute__(self, name):
        return str(len(bytearray(2**31))) if name == "gold" else super().__getattribute__(name)
