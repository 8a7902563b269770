"""The runs of a report, whoever made them. A reader is a module with `find_run`: the run in a path,
or None where it is of another format. `READERS` lists them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.trust import clean
from cera_train.report.readers import lm_eval, own, scores
from cera_train.report.readers.files import safe_name
from cera_train.report.runs import Evaluation, Run, Scores

READERS = (own, lm_eval, scores)

NUMBER_IN_NAME = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
SEED = re.compile(r"(?:seed[-_=]?)?(\d{1,9})", re.ASCII)  # the name of a folder


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in some paths, each once, in the order given; those of a folder by name. A path is
    that of a run, or holds runs."""
    by_path: dict[Path, Run] = {}
    for path in paths:
        for run in _runs_at(path):
            by_path.setdefault(run.folder.resolve(), run)
    runs = list(by_path.values())
    count = Counter(run.name for run in runs)
    paths = [clean(str(run.folder)) for run in runs]
    return [
        run if count[run.name] == 1 else replace(run, name=path)
        for run, path in zip(runs, paths, strict=True)
    ]


def _runs_at(path: Path) -> list[Run]:
    if run := find_run(path):
        return [run]
    runs = []
    if path.is_dir():
        inside = sorted(path.iterdir(), key=_by_number)
        runs = [run for run in map(find_run, inside) if run is not None]
    if not runs:
        what = "holds no results" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}: expected a folder that cera-train left (outputs/NAME), one of lm-eval "
            'with samples_*.jsonl, JSON lines of {"problem": ..., "score": ...}, or a folder of '
            "these. Check the path."
        )
    return runs


def find_run(path: Path) -> Run | None:
    """The run in a path, or the one whose seeds are its subfolders; None where there is neither."""
    run = _run_by_format(path)
    if run or not path.is_dir():
        return run
    runs = {str(seed): _run_by_format(each) for seed, each in seed_folders(path).items()}
    has_scores = [run and run.evaluations and not run.is_training for run in runs.values()]
    return _run_of_seeds(path, runs) if runs and all(has_scores) else None


def _run_by_format(path: Path) -> Run | None:
    runs = (reader.find_run(path) for reader in READERS)
    return next((run for run in runs if run is not None), None)


def seed_folders(folder: Path) -> dict[int, Path]:
    """The folders 0, 1, ... or seed0, seed1, ... in a folder."""
    seeds: dict[int, Path] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and (match := SEED.fullmatch(path.name)):
                seeds[int(match[1])] = path
    return dict(sorted(seeds.items()))


def _by_number(path: Path) -> list[str | float]:
    """Sorts r16 before r128, and lr=0.0005 before lr=0.001."""
    parts = re.split(NUMBER_IN_NAME, path.name)  # text, number, text, ...
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def _run_of_seeds(folder: Path, runs: dict[str, Run]) -> Run:
    """One run whose scores are those of all seeds, on the tasks that each of them has."""
    first, *others = runs.values()
    evaluations = {}
    for task in first.evaluations:
        if all(task in run.evaluations for run in others):
            of_task = {seed: run.evaluations[task] for seed, run in runs.items()}
            evaluations[task] = _evaluation_of_seeds(f"{folder}, {task}", of_task)
    name = safe_name(folder.resolve().name)
    return replace(first, folder=folder, name=name, evaluations=evaluations)


def _evaluation_of_seeds(place: str, by_seed: dict[str, Evaluation]) -> Evaluation:
    first, *others = by_seed.values()
    require(
        all(each.same == first.same for each in others),
        f"{place}: the seeds differ in {' or '.join(first.same)}. Evaluate them alike.",
    )
    scores = {}
    for rule in first.scores:
        if all(rule in each.scores for each in others):
            of_rule = {seed: each.scores[rule] for seed, each in by_seed.items()}
            scores[rule] = Scores.of_seeds(place, of_rule)
    endings = {
        ending: fmean(each.endings.get(ending, 0.0) for each in by_seed.values())
        for ending in first.endings
    }
    return Evaluation.of_scores(scores, endings=endings, same=first.same, settings=first.settings)
