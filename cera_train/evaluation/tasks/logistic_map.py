"""The logistic map x' = growth x (1 - x): the paper's case study of a model that has to keep moving. A problem gives x0
and asks for the next iterates; data/logistic_map.py computes them."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cera_train.common.errors import UserError
from cera_train.data import logistic_map as training_rows
from cera_train.evaluation.tasks.task import AnswerTask, Metric, Table, question_id
from cera_train.runs.evaluation_folder import Generation, Grade, Problem
from cera_train.settings.data import DataConfig, Layout, LogisticMapConfig, check_growths
from cera_train.settings.tasks import TaskConfig

EVAL_ROWS = 20
"""Starting points for a model that was not trained on this task: those of conf/data/logistic_map.yaml."""

PAPER_X0, PAPER_CASE = 0.4, LogisticMapConfig(growth=3.5, steps=5, decimals=4)
"""The paper's case study of state collapse. It is asked and printed, and does not count in the scores."""


class LogisticMap(AnswerTask):
    def check(self, config: TaskConfig) -> None:
        check_growths("task.growths", config.growths)
        if config.prompt or config.files:
            reason = "task=logistic_map writes its problems as in training"
            raise UserError(f"{reason}: it takes neither task.prompt nor task.files.")

    def problems(self, config: TaskConfig, data: DataConfig | None) -> Iterable[Problem]:
        """Every growth from every starting point that the run held out, then the paper's case."""
        trained_on = [part for _, part in data.parts() if part.layout == Layout.logistic_map] if data else []
        data = (trained_on or [DataConfig(layout=Layout.logistic_map, eval_rows=EVAL_ROWS)])[0]
        _, starts = training_rows.starting_points(data.logistic_map, data.eval_rows)
        cases = itertools.product(starts, config.growths)
        for x0, growth in itertools.islice(cases, config.limit):
            trained = growth in data.logistic_map.growths if trained_on else None
            yield _problem(x0, growth, data.logistic_map, trained=trained)
        yield _problem(PAPER_X0, PAPER_CASE.growth, PAPER_CASE, paper_case=True)

    def grade(self, problem: Problem, generation: Generation) -> Grade:
        decimals = problem.details["decimals"]
        values = extract(generation.text, steps=problem.gold.count(",") + 1)
        steps = compare(values, problem.gold, decimals)
        answer = ", ".join(f"{value:.{decimals}f}" for value in values) or None
        details = {"values": values, **asdict(steps)}
        return Grade(generation.problem, generation.sample, answer, exact=all(steps.matches), details=details)

    def is_collapsed(self, grade: Grade) -> bool:
        return grade.details["collapsed"]

    def counts(self, problem: Any) -> bool:
        return "paper_case" not in problem.details

    def scores(self, problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, Any]:
        details = {problem.id: problem.details for problem in problems if self.counts(problem)}
        counted = [grade for grade in grades if grade.problem in details]
        by_growth = {}
        for growth, trained in dict.fromkeys((each["growth"], each.get("trained")) for each in details.values()):
            if same := [grade for grade in counted if details[grade.problem]["growth"] == growth]:
                scores = step_scores(same).items()
                means = {key: value for key, value in scores if not isinstance(value, list)}
                by_growth[f"{growth:g}"] = {"trained": trained} | means
        scores = step_scores(counted) | {"by_growth": by_growth}
        case = next(problem for problem in problems if not self.counts(problem))
        grade = next((grade for grade in grades if grade.problem == case.id), None)
        return scores if grade is None else scores | {"paper_case": _beside_truth(case, grade)}

    def paired_value(self, grade: Any, grader: str) -> float:
        matches = grade.details["matches"]
        return sum(matches) / len(matches)

    def lines(self, result: Mapping[str, Any]) -> dict[str, str]:
        lines = {"by step": "  ".join(f"{share:.0%}" for share in result["step_accuracy"])}
        for growth, scores in result["by_growth"].items():
            error = scores["absolute_error/mean"]
            shown = "none given" if error is None else f"{error:.4f}"
            right, collapse = scores["step_accuracy/mean"], scores["state_collapse"]
            unseen = ", not trained on" if scores.get("trained") is False else ""
            text = f"steps right {right:.1%}, absolute error {shown}, state collapse {collapse:.1%}{unseen}"
            lines[f"r = {growth}"] = text
        return lines

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        case = result.get("paper_case")
        if case is None:
            return []
        pairs = enumerate(zip(case["truth"], case["answer"], strict=True), start=1)
        rows = [(f"x{step}", true, answer or "-") for step, (true, answer) in pairs]
        return [Table(f"r = {PAPER_CASE.growth:g}, x0 = {PAPER_X0:g}", ("step", "truth", "answer"), rows)]


TASK = LogisticMap(
    name="logistic map",
    settings=("growths",),
    shown=(
        Metric("step_accuracy/mean", "steps right", in_picture=True),
        Metric("state_collapse", "state collapse", lower_is_better=True),
    ),
    is_verified=False,
    score_name="steps",
)


def _problem(x0: float, growth: float, case: LogisticMapConfig, **marks: bool | None) -> Problem:
    row = training_rows.problem(x0, growth, case)
    details = {"growth": growth, "x0": x0, "decimals": case.decimals, **marks}
    return Problem(question_id(row["prompt"]), row["prompt"], row["prompt"], row["completion"].strip(), details)


def extract(text: str, steps: int) -> list[float]:
    """The first `steps` values of an answer's first line. Between commas, a value is the last number: the 0.84 of
    `x1 = 3.5 * 0.4 * 0.6 = 0.84`. In a line without commas, every number with a decimal point is one."""
    line = text.strip().partition("\n")[0]
    if "," in line:
        numbers = [numbers[-1] for part in line.split(",") if (numbers := re.findall(r"-?\d*\.?\d+", part))]
    else:  # digits are taken from their first one on only, else a long row of them is searched from each
        numbers = re.findall(r"-?(?:(?<!\d)\d++)?\.\d+", line)
    return [value for value in map(float, numbers) if math.isfinite(value)][:steps]


@dataclass(frozen=True)
class Steps:
    """An answer beside the truth, step by step."""

    matches: list[bool]
    """Whether a step agrees in every decimal; a missing one does not."""
    errors: list[float | None]
    """Absolute error of a step; None where it is missing."""
    collapsed: bool


def compare(values: Sequence[float], gold: str, decimals: int) -> Steps:
    """Compares what `extract` found with the true iterates, which a completion separates by commas."""
    truth = [number.strip() for number in gold.split(",")]
    shown = [f"{value:.{decimals}f}" for value in values]
    matches = [value == true for value, true in itertools.zip_longest(shown, truth)]
    pairs = itertools.zip_longest(values, truth)
    errors = [None if value is None else abs(value - float(true)) for value, true in pairs]
    return Steps(matches, errors, is_collapsed(shown, truth))


def is_collapsed(answer: Sequence[str], truth: Sequence[str]) -> bool:
    """State collapse: from some step on the answer repeats one value to its end, where the truth moves."""
    repeated = len(list(itertools.takewhile(lambda value: value == answer[-1], reversed(answer))))
    return repeated > 1 and len(set(truth[len(answer) - repeated : len(answer)])) > 1


def step_scores(grades: Sequence[Grade]) -> dict[str, Any]:
    """Accuracy and error of each step and in the mean, and the shares of steps given and of collapsed answers."""
    accuracy = [_mean(step) for step in zip(*(grade.details["matches"] for grade in grades), strict=True)]
    all_errors = [grade.details["errors"] for grade in grades]
    error = [_mean([value for value in step if value is not None]) for step in zip(*all_errors, strict=True)]
    return {
        "step_accuracy": accuracy,
        "step_accuracy/mean": _mean(accuracy),
        "absolute_error": error,
        "absolute_error/mean": _mean([value for value in error if value is not None]),
        "steps_given": _mean([value is not None for errors in all_errors for value in errors]),
        "state_collapse": _mean([grade.details["collapsed"] for grade in grades]),
    }


def _beside_truth(case: Problem, grade: Grade) -> dict[str, Any]:
    truth = case.gold.split(", ")
    answer = [f"{value:.{case.details['decimals']}f}" for value in grade.details["values"]]
    missing = [None] * (len(truth) - len(answer))
    return {"truth": truth, "answer": answer + missing, "collapsed": grade.details["collapsed"]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
