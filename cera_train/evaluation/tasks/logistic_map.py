"""The logistic map x' = growth x (1 - x): the paper's case study of a model that has to keep
moving. A problem gives x0 and asks for the next iterates; data/computed.py has the rows."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cera_train.data.computed import logistic_map_row, starting_points
from cera_train.data.reader import Reader
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    fields_of_prompt,
    mean,
    question_id,
)
from cera_train.runs.evaluation_folder import COLLAPSED, Generation, Grade, Problem
from cera_train.settings.data import DataConfig, Layout

# starting points for a model that was not trained on this task: those of
# conf/data/logistic_map.yaml
EVAL_ROWS = 20


class LogisticMap(AnswerTask):
    def problems(self, data: DataConfig | None, tokenizer: Any) -> Iterable[Problem]:
        """Every growth from every starting point that the run held out, in its first data set of
        such rows, asked as its rows are."""
        parts = [] if data is None else [part for _, part in data.parts()]
        parts = [part for part in parts if part.layout == Layout.logistic_map]
        [rows] = parts[:1] or [DataConfig(layout=Layout.logistic_map, eval_rows=EVAL_ROWS)]
        settings = rows.logistic_map
        reader = Reader(rows, tokenizer)
        _, starts = starting_points(settings, rows.eval_rows)
        pairs = itertools.product(starts, self.config.growths)
        for x0, growth in itertools.islice(pairs, self.config.limit):
            row = logistic_map_row(x0, growth, settings)
            question = row["prompt"]
            details = {"growth": growth, "decimals": settings.decimals}
            [asked] = reader.questions("", row)
            details |= fields_of_prompt(asked)
            gold = row["completion"].strip()
            yield Problem(id=question_id(question), question=question, gold=gold, **details)

    def grade(self, problem: Problem, generation: Generation) -> Grade:
        decimals = problem.details["decimals"]
        truth = problem.gold.split(", ")
        values = [
            f"{value:.{decimals}f}" for value in read_values(generation.text, steps=len(truth))
        ]
        matches = [value == true for value, true in itertools.zip_longest(values, truth)]
        details = {"matches": matches, "collapsed": is_collapsed(values, truth)}
        ending = COLLAPSED if details["collapsed"] else None
        answer = ", ".join(values) or None
        return Grade(
            generation.problem,
            generation.sample,
            answer,
            all(matches),
            score=mean(matches),
            ending=ending,
            **details,
        )

    def scores(self, problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
        """The accuracy of each step and of all, and the share of collapsed answers."""
        accuracy = [
            mean(step) for step in zip(*(grade.details["matches"] for grade in grades), strict=True)
        ]
        return {
            "step_accuracy": accuracy,
            "step_accuracy/mean": mean(accuracy),
            "state_collapse": mean([grade.details["collapsed"] for grade in grades]),
        }

    def lines(self, result: Mapping[str, Any]) -> dict[str, str]:
        return {"by step": "  ".join(f"{share:.0%}" for share in result["step_accuracy"])}


TASK = LogisticMap(is_verified=False)


def read_values(text: str, steps: int) -> list[float]:
    """The first `steps` values of an answer's first line. Between commas, a value is the last
    number: the 0.84 of `x1 = 3.5 * 0.4 * 0.6 = 0.84`. In a line without commas, every number with a
    decimal point is one."""
    line = text.strip().partition("\n")[0]
    if "," in line:
        numbers = [
            numbers[-1] for part in line.split(",") if (numbers := re.findall(r"-?\d*\.?\d+", part))
        ]
    # a number starts at its first digit: else a long row of digits is searched from each of them
    else:
        numbers = re.findall(r"-?(?:(?<!\d)\d++)?\.\d+", line)
    return [value for value in map(float, numbers) if math.isfinite(value)][:steps]


def is_collapsed(answer: Sequence[str], truth: Sequence[str]) -> bool:
    """State collapse: from some step on the answer repeats one value to its end, where the truth
    moves."""
    repeated = len(list(itertools.takewhile(lambda value: value == answer[-1], reversed(answer))))
    return repeated > 1 and len(set(truth[len(answer) - repeated : len(answer)])) > 1
