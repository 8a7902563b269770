"""`train.extend`: a finished run trains on for more epochs or updates. RUN/ends/UPDATE keeps it as it ended, a run's
folder of its own without checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cera_train.common import files
from cera_train.common.errors import UserError
from cera_train.runs.outcomes import GRADES, LOSSES_AFTER, LOSSES_BEFORE
from cera_train.runs.results import LOGS, RunResult

LENGTH = ("train.epochs", "train.max_updates")
"""The settings that an extension may change."""

STAYS = ("config.yaml", "environment.json", LOSSES_BEFORE, *LOGS)
"""Files of a run that goes on with them: its end gets copies."""

ENDS_RUN = ("adapter", "eval", GRADES, LOSSES_AFTER, "spectrum.json", "run.png", "result.json")
"""What is of the end alone. result.json is the last: as long as it is there, keeping the end is not over."""


def ends(run: Path) -> list[Path]:
    """Folders of the earlier ends of a run, oldest first."""
    folders = [path for path in (run / "ends").glob("[0-9]*") if (path / "result.json").is_file()]
    return sorted(folders, key=lambda path: int(path.name))


def keep_end(run: Path) -> None:
    """Moves the end of a finished run to ends/UPDATE, so that the run is unfinished. Interrupted, it goes on when it is
    called again."""
    updates = RunResult.read(run / "result.json", needs=["updates"]).updates
    end = run / "ends" / str(updates)
    end.mkdir(parents=True, exist_ok=True)
    for name in STAYS:
        if (run / name).is_file():
            files.write_bytes(end / name, (run / name).read_bytes())
    for name in ENDS_RUN:
        if (run / name).exists():
            (run / name).rename(end / name)
    files.sync(end)
    files.sync(run)


def check_extension(run: Path, train: dict[str, Any], is_out_of_patience: bool) -> None:
    """Raises UserError where `train.extend` has nothing to extend.

    Args:
        train: the section of the longer run's config.
        is_out_of_patience: whether the run stopped by `train.patience`.
    """
    finished = [run] if (run / "result.json").is_file() else ends(run)[-1:]
    if not finished:
        raise UserError(f"train.extend=true is for a finished run: let the command that began {run} finish it first.")
    if is_out_of_patience:
        raise UserError(
            f"train.extend=true: {run} stopped by train.patience={train['patience']}, and so would a longer run. Go on "
            "in a new folder, with train.resume=CHECKPOINT name=NEW and another patience."
        )
    end = RunResult.read(finished[0] / "result.json", needs=["updates", "epochs"])
    per_epoch = round(end.updates / end.epochs)
    updates = train["max_updates"] or train["epochs"] * per_epoch
    if updates <= end.updates:
        raise UserError(
            f"train.extend=true: {run} ended at update {end.updates:,}, and train.epochs={train['epochs']} "
            f"train.max_updates={train['max_updates']} is {updates:,} ({per_epoch:,} an epoch): set more."
        )
