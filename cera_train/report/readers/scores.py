"""JSON lines of {"problem": ..., "score": ...}, of any program: FOLDER/TASK.jsonl, or one file."""

from pathlib import Path
from typing import ClassVar

from cera_train.common.settings import require
from cera_train.report.readers.files import files_in, is_score, safe_name
from cera_train.report.runs import Evaluation, Run, Scores
from cera_train.runs.records import Record, read_trees

RULE = "score"


class ScoredProblem(Record):
    fix: ClassVar[str] = "Correct the line."

    problem: str | int
    score: float | bool


def find_scored_run(path: Path) -> Run | None:
    is_file = path.suffix == ".jsonl" and path.is_file()
    files = list(filter(_has_scores, [path] if is_file else files_in(path, "*.jsonl")))
    if not files:
        return None
    evaluations = {safe_name(file.stem): read_score_lines(file) for file in files}
    return Run(path, safe_name(path.resolve().stem), evaluations=evaluations)


def _has_scores(file: Path) -> bool:
    for _, tree in read_trees(file):
        return isinstance(tree, dict) and {"problem", "score"} <= tree.keys()
    return False


def read_score_lines(file: Path) -> Evaluation:
    """Scores of a file. Raises UserError for one outside 0 to 1, or a problem that comes again."""
    scores: Scores = {}
    for place, tree in read_trees(file):
        record = ScoredProblem.from_json(tree, place)
        require(
            is_score(record.score),
            f"{place}: score {record.score}: expected a number from 0 to 1. Scale the scores.",
        )
        problem = str(record.problem)
        require(
            problem not in scores,
            f"{place}: problem {problem[:40]!r} comes again. Write the mean of its answers.",
        )
        scores[problem] = float(record.score)
    return Evaluation.of_scores({RULE: scores})
