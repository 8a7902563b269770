"""What runs left on the disk, as a report needs it. Nothing is made up: what is not there is None, or an empty list."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cera_train.common.errors import UserError
from cera_train.common.files import read_json, read_yaml
from cera_train.common.settings import flatten
from cera_train.common.trust import clean
from cera_train.data.config import evaluation_rows
from cera_train.runs.card import NAMES
from cera_train.runs.subject import run_of

KINDS = NAMES | {"base": "untouched base"}

STEPS = "steps"
"""The logistic map's grader beside `exact`: the share of a trajectory's steps that are right."""


NUMBER_IN_NAME = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
"""In the name of a folder."""


@dataclass(frozen=True)
class Evaluation:
    """RUN/eval/NAME."""

    name: str
    folder: Path
    settings: dict[str, Any]
    """config.yaml, with dotted keys."""
    result: dict[str, Any] | None
    """None: it is unfinished."""

    @property
    def is_perplexity(self) -> bool:
        return self.kind in ("perplexity", "text")

    @property
    def kind(self) -> str:
        return (self.result or {}).get("kind", self.settings.get("task.kind", ""))

    @property
    def rows(self) -> tuple:
        """What decides the rows of a perplexity, apart from the run's own data: equal for the same rows."""
        return evaluation_rows(
            {key: value for key, value in self.settings.items() if key.startswith(("task.", "data"))}
        )

    @cached_property
    def problems(self) -> dict[str, dict[str, Any]]:
        """By id, in the task's order."""
        return {row["id"]: row for row in _read_lines(self.folder / "problems.jsonl", PROBLEM)}

    @cached_property
    def grades(self) -> dict[str, list[dict[str, Any]]]:
        """By problem, one for each sample, without the logistic map's case of the paper, which is not in its accuracy.

        Raises:
            ValueError: problems have no grades, or there are no problems.
        """
        kinds = GRADE | ({"matches": list} if self.kind == "logistic_map" else {})
        grades: dict[str, list[dict[str, Any]]] = {
            name: [] for name, row in self.problems.items() if not row.get("paper_case")
        }
        if not grades:
            raise UserError(f"{self.folder} has no problems. {EVALUATE}")
        for row in _read_lines(self.folder / "grades.jsonl", kinds):
            if row["problem"] in grades:
                grades[row["problem"]].append(row)
        if ungraded := sum(not rows for rows in grades.values()):
            raise UserError(
                f"{self.folder} has no grades for {ungraded} of its {len(grades)} problems: "
                f"grade the answers again with cera-eval grade={self.folder}."
            )
        return grades

    def share_right(self, problem: str, grader: str) -> float:
        """Of the answers to one problem; by STEPS, of their steps."""
        rows = self.grades[problem]
        if grader == STEPS:
            return sum(sum(row["matches"]) / len(row["matches"]) for row in rows) / len(rows)
        return sum(row[grader] for row in rows) / len(rows)

    @cached_property
    def texts(self) -> dict[tuple[str, int], str]:
        """What was generated, by problem and sample."""
        rows = _read_lines(self.folder / "generations.jsonl", GENERATION)
        return {(row["problem"], row["sample"]): row["text"] for row in rows}

    @property
    def samples(self) -> int:
        return max(len(rows) for rows in self.grades.values())

    @property
    def is_verified(self) -> bool:
        """Whether the second grader looked at every answer."""
        return all(row.get("verified") is not None for rows in self.grades.values() for row in rows)


@dataclass(frozen=True)
class Run:
    """A training run, an adapter, or the untouched base model, with its evaluations."""

    folder: Path
    name: str
    settings: dict[str, Any]
    """config.yaml, with dotted keys; of what was not trained here only what is known of it."""
    is_training: bool
    """False: there are evaluations only."""
    result: dict[str, Any] | None = None
    """None: unfinished, or evaluations only."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    spectrum: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    """The paper's figures: a key of result.json, or TASK/METRIC of an evaluation."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """environment.json: where it was trained."""

    @property
    def command(self) -> str | None:
        """That trained it, as one types it."""
        words = self.environment.get("command")
        if not words:
            return None
        first, *others = map(str, words)
        program = Path(first).name
        start = ["python", "-m", "cera_train"] if program == "__main__.py" else [program]
        return shlex.join([*start, *others])

    @property
    def machine(self) -> str | None:
        """What it was trained on. None: not on record."""
        known = self.environment
        if "gpus" not in known:
            return None
        names = [str(gpu.get("name")) if isinstance(gpu, dict) else str(gpu) for gpu in known["gpus"] or []]
        on = ", ".join(names) or f"CPU, {known.get('cpu_threads', '?')} threads"
        return f"{on}, {known.get('processes', 1)} processes"

    @property
    def is_unfinished(self) -> bool:
        return self.is_training and self.result is None

    @property
    def kind(self) -> str:
        return self.settings.get("adapter.kind", "base")

    @property
    def method(self) -> str:
        """The method, with what sets a variant of it apart: CeRA (relu), LoRA (alpha 32)."""
        r, alpha = self.rank, self.settings.get("adapter.alpha")
        gate = self.settings.get("adapter.activation") or "silu"
        variant = [gate] if self.kind == "cera" and gate != "silu" else []
        variant += [f"alpha {alpha:g}"] if alpha is not None and alpha != r else []
        return KINDS.get(self.kind, self.kind) + (f" ({', '.join(variant)})" if variant else "")

    @property
    def rank(self) -> int | None:
        return self.settings.get("adapter.r")

    @property
    def last_update(self) -> int:
        return max((line["update"] for line in self.metrics), default=0)

    def measured(self, key: str) -> float | None:
        """A figure of result.json; of an unfinished run, the last one it wrote down."""
        if self.result is not None:
            return self.result.get(key)
        known = [line[name] for line in self.metrics for name in (key, f"train/{key}") if name in line]
        return known[-1] if known else None

    @property
    def evaluation_rows(self) -> tuple:
        """What decides on which tokens the perplexity of training is taken: equal for comparable runs."""
        return evaluation_rows({key: value for key, value in self.settings.items() if key.startswith("data.")})

    @property
    def base(self) -> str:
        """The model that the adapter is on, with what its weights are kept in: that too changes a perplexity."""
        path, revision, dtype, quantization = (
            self.settings.get(f"model.{key}") for key in ("path", "revision", "dtype", "quantization")
        )
        named = f"{path or 'a model not on record'}" + (f" at {revision}" if revision else "")
        return ", ".join([named, *(str(kept) for kept in (dtype, quantization) if kept not in (None, "none"))])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in some folders, each once, in the order given; those of a sweep by name.

    Args:
        folders: of a run, of an adapter or a base model with evaluations, or a folder of such folders.

    Raises:
        ValueError: a folder is none of these, or a file in it is broken.
    """
    if not folders:
        raise UserError("there is nothing to compare: name the folder of a run, such as outputs/math_r64.")
    found = {folder.resolve(): folder for given in folders for folder in _expand(Path(given))}
    return _with_unique_names([_read_run(folder) for folder in found.values()])


def _expand(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    inside = [path for path in folder.iterdir() if path.is_dir() and _is_run(path)] if folder.is_dir() else []
    if not inside:
        what = "holds neither a run nor folders of runs" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {what}: expected a folder that cera-train left (with config.yaml), one with evaluations "
            "(eval/TASK), or a folder of these. Check the path: runs lie in outputs/NAME."
        )
    yield from sorted(inside, key=_by_number)


def _by_number(path: Path) -> list[str | float]:
    """Sorts r16 before r128, and lr=0.0005 before lr=0.001."""
    return [float(part) if index % 2 else part for index, part in enumerate(re.split(NUMBER_IN_NAME, path.name))]


def _is_run(folder: Path) -> bool:
    return _is_training(folder) or any(folder.glob("eval/*/config.yaml"))


def _is_training(folder: Path) -> bool:
    path = folder / "config.yaml"
    return path.is_file() and "adapter" in _read_yaml(path)  # an evaluation's config.yaml has no adapter


def _read_run(folder: Path) -> Run:
    evaluations = {
        path.parent.name: _read_evaluation(path.parent) for path in sorted(folder.glob("eval/*/config.yaml"))
    }
    if not _is_training(folder):
        name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
        if not (folder / "adapter_config.json").is_file():
            name = folder.resolve().name
        return Run(folder, name, _known_settings(folder, evaluations), False, evaluations=evaluations)
    path = folder / "config.yaml"
    tree = _read_yaml(path)
    published = _checked(tree.pop("published", None) or {}, path)
    return Run(
        folder,
        clean(str(tree.get("name") or folder.resolve().name)),  # no picture can show half of a surrogate pair
        _checked(flatten(tree), path, SETTINGS | {"adapter.kind": str, "adapter.r": int}),
        True,
        _figures(_read_json(folder / "result.json"), folder / "result.json"),
        _read_metrics(folder / "metrics.jsonl"),
        _read_spectrum(folder / "spectrum.json"),
        _figures(published, path),
        evaluations,
        _checked(_read_json(folder / "environment.json") or {}, folder / "environment.json", ENVIRONMENT),
    )


def _known_settings(folder: Path, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Of an adapter's folder what the run above it or PEFT's file says; of a base model what its evaluations say."""
    adapter = _read_json(folder / "adapter_config.json")
    run = run_of(folder.resolve())
    if adapter is not None and run is not None:
        return _checked(flatten(_read_yaml(run / "config.yaml")), run / "config.yaml", SETTINGS)
    evaluation = next(iter(evaluations.values()))
    settings = {key: value for key, value in evaluation.settings.items() if key.startswith("model.")}
    if adapter is None:
        return settings
    kind = str(adapter.get("peft_type", "")).lower()
    kind = {"use_dora": "dora", "use_rslora": "rslora"}.get(
        next((name for name in ("use_dora", "use_rslora") if adapter.get(name)), ""), kind
    )
    own = {"adapter.kind": kind, "adapter.r": adapter.get("r"), "adapter.alpha": adapter.get("lora_alpha")}
    return settings | _checked(own, folder / "adapter_config.json", SETTINGS)


def _read_evaluation(folder: Path) -> Evaluation:
    settings = _checked(flatten(_read_yaml(folder / "config.yaml")), folder / "config.yaml", SETTINGS)
    return Evaluation(
        folder.name, folder, settings, _figures(_read_json(folder / "result.json"), folder / "result.json")
    )


def _with_unique_names(runs: list[Run]) -> list[Run]:
    """Runs of one name are told apart by their folders: by as much of the paths as that takes."""
    depth = 1
    while repeated := {name for name, count in Counter(run.name for run in runs).items() if count > 1}:
        runs = [_named_by_folder(run, depth) if run.name in repeated else run for run in runs]
        depth += 1
    return runs


def _named_by_folder(run: Run, depth: int) -> Run:
    return replace(run, name="/".join(run.folder.resolve().parts[-depth:]))


# --- files -----------------------------------------------------------------------------------------------------------

RESTORE = "Restore it, or leave the run out."
EVALUATE = "Evaluate the run again."

Kinds = dict[str, Any]
"""What a value has to be an instance of, by its name. One that may be None may be missing too."""

NUMBER = int | float
PROBLEM: Kinds = {"id": str, "question": str, "gold": str}
GENERATION: Kinds = {"problem": str, "sample": int, "text": str}
GRADE: Kinds = {"problem": str, "sample": int, "answer": str | None, "exact": bool, "verified": bool | None}
SETTINGS: Kinds = {
    "adapter.kind": str | None, "adapter.r": int | None, "adapter.alpha": NUMBER | None,
    "adapter.activation": str | None, "task.kind": str | None, "task.limit": int | None,
}  # fmt: skip
ENVIRONMENT: Kinds = {"command": list | None, "gpus": list | None}
NO_FIGURES = ("task", "kind", "adapter_kind", "folder", "by_growth", "paper_case", "step_accuracy", "absolute_error")
"""Of result.json: what is no number, and no report reads as one."""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ValueError as error:
        raise UserError(f"{error} Or leave the run out.") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        return read_json(path) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{error} Or leave the run out.") from error


def _read_lines(path: Path, kinds: Kinds, mend: str = EVALUATE, may_break_off: bool = False) -> list[dict[str, Any]]:
    """A file with an object in every line.

    Args:
        may_break_off: of a run that is still writing, or was cut, the last line may be half a line.
    """
    try:
        lines = path.read_text().splitlines()
        if may_break_off and lines and not lines[-1].endswith("}"):
            lines.pop()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken: {getattr(error, 'strerror', None) or error}. {mend}") from error
    return [_checked(row, f"{path}:{number}", kinds, mend) for number, row in enumerate(rows, start=1)]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = _read_lines(path, {"update": int}, RESTORE, may_break_off=True) if path.is_file() else []
    return [_figures(row, f"{path}:{number}") for number, row in enumerate(rows, start=1)]


def _read_spectrum(path: Path) -> dict[str, dict[str, Any]]:
    modules = _read_json(path) or {}
    for name, module in modules.items():
        values = _checked(module, path, {"singular_values": list})["singular_values"]
        if not (values and all(isinstance(value, NUMBER) for value in values)):
            raise UserError(f"{path} is broken: the singular values of {name[:60]!r} are not numbers. {RESTORE}")
    return modules


def _checked(tree: Any, where: Path | str, kinds: Kinds | None = None, mend: str = RESTORE) -> dict[str, Any]:
    """Names and values, of these kinds.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where} is broken: expected names and values, got {str(tree)[:40]!r}. {mend}")
    for name, kind in (kinds or {}).items():
        if not isinstance(tree.get(name), kind):
            has = f"its {name} is {str(tree[name])[:40]!r}" if name in tree else f"it has no {name}"
            raise UserError(f"{where} is broken: {has}. {mend}")
    return tree


def _figures(tree: dict[str, Any] | None, where: Path | str) -> dict[str, Any] | None:
    """Names and numbers, with two for an interval; None where there is no file."""
    for name, value in (tree or {}).items():
        if name.endswith("/interval"):
            is_sound = isinstance(value, list) and len(value) == 2 and all(isinstance(end, NUMBER) for end in value)
        else:
            is_sound = name in NO_FIGURES or isinstance(value, NUMBER | None)
        if not is_sound:
            raise UserError(f"{where} is broken: its {name[:60]} is {str(value)[:40]!r}. {RESTORE}")
    return tree
