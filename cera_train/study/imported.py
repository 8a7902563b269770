"""Arms that another program ran: `study.results=FOLDER`, with the results of seed 0 in FOLDER/0, in
any format that a report reads. The study copies the scores and judges them as its own."""

from collections.abc import Sequence
from pathlib import Path

from cera_train.common.settings import require, require_folder_name
from cera_train.report.readers import find_run, seed_folders
from cera_train.runs.results import Environment, GradedProblem, RunResult, write_grades
from cera_train.settings.sweep import RESULTS
from cera_train.study.cells import SEED
from cera_train.sweep.folder import key_of


def is_imported(overrides: Sequence[str]) -> bool:
    """Whether these are the overrides of such an arm."""
    return RESULTS in map(key_of, overrides)


def import_run(folder: Path, overrides: Sequence[str], outcomes: Sequence[str]) -> None:
    """Writes what a finished run leaves, with the scores of one seed. An imported run stays.

    Args:
        folder: of the job.
        outcomes: the tasks that the study compares.

    Raises:
        UserError: the seed has no results, or none by problem on an outcome; or the folder holds
            those of another source.
    """
    values = dict(word.partition("=")[::2] for word in overrides)
    place = f"{RESULTS}={values[RESULTS]}"
    if (folder / "result.json").exists():
        earlier = Environment.read(folder / "environment.json").source
        require(
            earlier in (None, place),
            f"{folder} holds what {earlier} had: set that back, or remove the folder to copy "
            f"{place}.",
        )
        return
    source = seed_folders(Path(values[RESULTS])).get(int(values[SEED]))
    require(
        source is not None,
        f"{place} has no folder {values[SEED]} with the results of that seed: add it, or set "
        "study.seeds.",
    )
    run = find_run(source)
    require(run is not None, f"{source} holds no results that cera-report reads.")
    folder.mkdir(parents=True, exist_ok=True)
    answers: dict[str, str] = {}
    for outcome in outcomes:
        require_folder_name(outcome, "study.outcomes")
        evaluation = run.evaluations.get(outcome)
        names = ", ".join(run.evaluations) or "nothing"
        require(
            evaluation is not None and evaluation.is_graded,
            f"{source} has no scores on {outcome} of study.outcomes, only on {names}.",
        )
        rule, scores = next(iter(evaluation.scores.items()))
        require(
            scores.problems is not None,
            f"{source} has no scores by problem on {outcome}, which a study compares.",
        )
        graded = [
            GradedProblem(problem, score, "right" if score == 1 else "wrong")
            for problem, score in zip(scores.problems, scores.values[0].tolist(), strict=True)
        ]
        write_grades(folder, outcome, graded)
        answers |= {f"{what} of {outcome}": value for what, value in evaluation.same.items()}
        answers[f"rule that graded {outcome}"] = rule
    Environment(answers=answers, source=place).write(folder / "environment.json")
    RunResult().write(folder / "result.json")
