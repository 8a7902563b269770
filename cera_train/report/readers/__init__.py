"""The runs of a report, whoever made them. A reader finds the run in a path, or None where it is of
another format. `READERS` lists them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.trust import clean
from cera_train.report.readers.lm_eval import find_lm_eval_run
from cera_train.report.readers.own import find_own_run
from cera_train.report.readers.scores import find_scored_run
from cera_train.report.runs import Run

READERS = (find_own_run, find_lm_eval_run, find_scored_run)


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
    if run := read_run(path):
        return [run]
    runs = []
    if path.is_dir():
        runs = [run for run in map(read_run, sorted(path.iterdir())) if run is not None]
    if not runs:
        what = "holds no results" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}: expected a folder that cera-train left (outputs/NAME), one of lm-eval "
            'made with --log_samples, JSON lines of {"problem": ..., "score": ...}, or a folder of '
            "these. Check the path."
        )
    return runs


def read_run(path: Path) -> Run | None:
    """The run in a path, by the first reader that knows its format."""
    runs = (reader(path) for reader in READERS)
    return next((run for run in runs if run is not None), None)
