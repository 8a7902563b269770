"""The folder of one evaluation, RUN/eval/NAME: its config, problems, answers, grades and result.

Each process appends its answers to a generations file; at the end these become one, in the order of the problems.
Every other file appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml

from cera_train.common.errors import UserError
from cera_train.common.files import finite, lock_folder, read_json, read_yaml, write_text
from cera_train.common.records import record
from cera_train.common.settings import Changes, changes_of, flatten, to_plain
from cera_train.common.trust import redact_tree
from cera_train.evaluation.config import EvalConfig
from cera_train.runs.recorded_config import load_config
from cera_train.tasks.records import Generation, Problem

Key = tuple[str, int]
"""Problem and sample."""

HARMLESS = (Changes.cost, Changes.nothing)

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What parsing a line raises that is no JSON, or has other names or types of values."""


class EvaluationFolder:
    """RUN/eval/NAME, locked while it is open."""

    def __init__(self, path: Path, is_main: bool = True, process: int = 0) -> None:
        self.path, self.is_main = path, is_main
        self.process_answers = path / ("generations.jsonl" if is_main else f"generations.{process}.jsonl")

    def __enter__(self) -> EvaluationFolder:
        if self.is_main:
            self._is_new = not self.path.exists()
            run = self.path.parent.parent if self.path.parent.name == "eval" else None
            self._lock = lock_folder(self.path, "evaluation", root=run)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.is_main:
            if self._is_new and not self.has_begun:  # a mistake before the first answer leaves no trace
                shutil.rmtree(self.path)
                if not any(self.path.parent.iterdir()):
                    self.path.parent.rmdir()
            else:
                (self.path / ".lock").unlink()
            self._lock.release()

    @property
    def has_begun(self) -> bool:
        """Whether there are answers or a result, which bind the folder to its settings."""
        answers = self.path.glob("generations*.jsonl")
        return (self.path / "result.json").exists() or any(path.stat().st_size for path in answers)

    # --- settings and result -----------------------------------------------------------------------------------------

    def config(self) -> EvalConfig:
        """The recorded settings.

        Raises:
            UserError: there are none: this is not the folder of an evaluation.
        """
        path = self.path / "config.yaml"
        if not path.is_file() or "task" not in read_yaml(path):  # a run's folder has one too
            found = sorted(str(path.parent) for path in self.path.glob("**/eval/*/config.yaml"))
            hint = f" Evaluations in it: {', '.join(found)}." if found else ""
            raise UserError(f"{self.path} is not the folder of an evaluation, such as outputs/RUN/eval/TASK.{hint}")
        return load_config(path, EvalConfig)

    def write_config(self, config: EvalConfig) -> None:
        """Records the settings.

        Raises:
            UserError: the folder holds an evaluation with other settings.
        """
        path = self.path / "config.yaml"
        now = redact_tree(to_plain(config))
        if path.exists() and self.has_begun:
            before, after = flatten(read_yaml(path)), flatten(now)
            different = "; ".join(
                f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key) and changes_of(EvalConfig, key) not in HARMLESS
            )
            if different:
                raise UserError(
                    f"{self.path} holds an evaluation with other settings: {different}. Set name=... for another "
                    "folder, or set these back to resume it."
                )
        write_text(path, yaml.safe_dump(now, sort_keys=False))

    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None before the evaluation is finished."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def is_finished(self) -> bool:
        """Whether there is a result, and every answer that it counts."""
        result = self.result()
        if result is None or "samples" not in result:
            return result is not None
        answers, broken = self.answers()
        return not broken and len(answers) == len(self.problems()) * result["samples"]

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.path / "result.json", json.dumps(finite(result), indent=2, allow_nan=False) + "\n")

    # --- problems, answers, grades -----------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """The recorded problems.

        Raises:
            UserError: the evaluation was cut before it wrote any, or the file is broken.
        """
        path = self.path / "problems.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing: the evaluation did not begin. Run it again with run= and task=.")
        problems = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                fields = {name: row.pop(name) for name in ("id", "question", "prompt", "gold")}
                problems.append(record(Problem, fields | {"details": row}))
            except UNREADABLE as error:
                raise UserError(f"{path} is broken: {error!r} in {line[:60]!r}. Restore it.") from error
        return problems

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Records the problems.

        Raises:
            UserError: the folder has answers to other problems.
        """
        rows = [{**asdict(problem), **problem.details} for problem in problems]
        text = _lines({name: value for name, value in row.items() if name != "details"} for row in rows)
        path = self.path / "problems.jsonl"
        if path.exists() and self.has_begun and path.read_text() != text:
            raise UserError(
                f"{self.path} has answers to other problems: a data file changed. Restore it, or set "
                "name=... for another folder."
            )
        write_text(path, text)

    def answers(self) -> tuple[dict[Key, Generation], list[str]]:
        """The answers so far, and a message for each broken line: a process may die while it writes one."""
        answers, broken = {}, []
        for path in sorted(self.path.glob("generations*.jsonl")):
            readable, numbers = _read_answers(path)
            answers |= {(answer.problem, answer.sample): answer for answer in readable}
            broken += [f"{path}:{number} is broken" for number in numbers]
        return answers, broken

    def append_to_answers(self) -> TextIO:
        """Opens this process's file of answers for more, without its broken lines."""
        if self.process_answers.exists():
            readable, _ = _read_answers(self.process_answers)
            write_text(self.process_answers, _lines(map(asdict, readable)))
        return self.process_answers.open("a")

    def finish_answers(self, answers: Iterable[Generation]) -> None:
        """Writes all answers, in order, into one file."""
        write_text(self.path / "generations.jsonl", _lines(map(asdict, answers)))
        for path in self.path.glob("generations.*.jsonl"):
            path.unlink()

    def write_grades(self, grades: Iterable[dict[str, Any]]) -> None:
        write_text(self.path / "grades.jsonl", _lines(grades))


def append_answers(file: TextIO, answers: Iterable[Generation]) -> None:
    """Appends answers, which a resumed evaluation finds."""
    file.write(_lines(map(asdict, answers)))
    file.flush()


def _read_answers(path: Path) -> tuple[list[Generation], list[int]]:
    """The answers of a file, and the numbers of its broken lines."""
    answers, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            answers.append(record(Generation, json.loads(line)))
        except UNREADABLE:
            broken.append(number)
    return answers, broken


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
