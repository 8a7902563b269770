"""Handmade run folders, in the format that training and evaluation leave."""

import copy
import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from made_files import write_json, write_lines

from cera_train.cli.compose import compose
from cera_train.common.settings import to_plain
from cera_train.evaluation.evaluate import score
from cera_train.evaluation.tasks import gsm8k
from cera_train.report.page import table_of_costs, table_of_runs
from cera_train.report.readers import read_runs
from cera_train.runs.evaluation_folder import Grade, Problem
from cera_train.runs.records import to_lines

HOSTILE = "<script>alert(1)|`*_[x](javascript:alert(2))\nnew \"line\" 'x' $x^2$ & {{ 7 * 7 }}"
"""A text that would be a script, a link, a table or a formula."""


@functools.cache
def recipe() -> dict[str, Any]:
    return to_plain(compose("+recipe=math_r64"))


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """Those of a recipe, with dotted keys changed."""
    tree = copy.deepcopy(recipe()) | {"name": name}
    change(tree, changes)
    return tree


def change(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Sets the values of dotted keys."""
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value


def result_of(r: int, perplexity: float) -> dict[str, Any]:
    """What the report reads of it."""
    return {
        "eval/perplexity": perplexity,
        "best_perplexity": perplexity - 0.1,
        "best_update": 80,
        "spectrum/effective_rank/mean": r * 0.4,
        "spectrum/manifold_dimension/mean": r * 0.2,
        "trainable_parameters": 425984 * r,
        "trainable_share": 0.0034,
        "updates": 100,
        "tokens_per_s": 1234.5,
        "seconds": 3725.4,
        "peak_memory_bytes": 5 * 2**30,
    }


def make_run(
    path: Path,
    perplexity: float = 1.9,
    finished: bool = True,
    held_out: str = "rows",
    **changes: Any,
) -> Path:
    """The folder of a training run; `held_out` is the digest of its rows, and `changes` are
    settings with dotted keys."""
    name = changes.pop("name", path.name)
    path.mkdir(parents=True)
    settings = settings_of(name, **changes)
    (path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_json(
        path / "environment.json",
        {
            "command": ["/opt/bin/cera-train", "+recipe=math_r64", f"name={name}"],
            "rows": {"held_out": held_out},
        },
    )
    r = settings["adapter"]["r"]
    lines: list[dict[str, Any]] = []
    for update in range(0, 101, 10):
        value = perplexity + 1.6 * (1 - update / 100)
        if update:
            speed = {"train/seconds": 6.0 * update, "train/tokens_per_s": 1000.0 + update}
            lines.append({"update": update, "train/loss": math.log(value) + 0.02} | speed)
        if update % 20 == 0:
            lines.append(
                {
                    "update": update,
                    "eval/loss": math.log(value),
                    "eval/perplexity": value,
                    "spectrum/effective_rank/mean": r * 0.004 * update,
                    "spectrum/linear_share/mean": 1 - update / 1000 if update else None,
                }
            )
    if not finished:
        lines = [line for line in lines if line["update"] <= 50]
    write_lines(path / "metrics.jsonl", lines)
    if finished:
        spectrum = {
            f"model.layers.{layer}.self_attn.q_proj": {
                "singular_values": [math.exp(-k / (r / (3 + layer))) for k in range(r)],
            }
            for layer in range(2)
        }
        write_json(path / "spectrum.json", spectrum)
        write_json(path / "result.json", result_of(r, perplexity))
    return path


def add_evaluation(
    run: Path,
    task: str = "gsm8k",
    solved: Any = frozenset(),
    verified: bool = True,
    problems: int = 40,
    samples: int = 1,
    **changes: Any,
) -> Path:
    """Graded answers to a task. `solved` are the problems answered right, or a function of problem
    and sample; without `verified`, the second grader did not look."""
    folder = run / "eval" / task
    folder.mkdir(parents=True)
    kind = task if task in ("math", "gsm8k", "logistic_map") else "math"
    settings = {
        "run": str(run),
        "adapter_digest": str(run),
        "model": {"path": "meta-llama/Llama-3.1-8B"},
        "task": {"kind": kind, "name": task, "limit": problems, "max_new_tokens": 512},
        "generation": {"samples": samples, "temperature": 0.8 if samples > 1 else 0.0},
    }
    change(settings, changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = [Problem(f"id{n:03}", f"What is {n} + 1?", "Q", str(n + 1)) for n in range(problems)]
    (folder / "problems.jsonl").write_text(to_lines(asked))
    grades = []
    for n, sample in itertools.product(range(problems), range(samples)):
        is_right = solved(n, sample) if callable(solved) else n in solved
        grades.append(Grade(asked[n].id, sample, "7", is_right, is_right if verified else None))
    (folder / "grades.jsonl").write_text(to_lines(grades))
    result = score(replace(gsm8k.TASK, is_verified=verified), asked, [], grades)
    result.replace(task=task, kind=kind, problems=problems, samples=samples).write(
        folder / "result.json"
    )
    return folder


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Of 40 problems, both solve 10, only the first 12, only the second 9, and neither 9."""
    first = make_run(folder / "cera_64", 1.85)
    second = make_run(folder / "lora_512", 2.02, **{"adapter.kind": "lora", "adapter.r": 512})
    add_evaluation(first, "math", solved=set(range(22)))
    add_evaluation(second, "math", solved=set(range(10)) | set(range(22, 31)))
    return first, second


def cells(*folders: Path) -> dict[str, list[str]]:
    """Columns by label, in the order of the runs."""
    runs = read_runs(folders)
    columns = {}
    for table in (table_of_runs(runs), table_of_costs(runs)):
        for row in table.rows:
            for name, cell in row.items():
                columns.setdefault(name, []).append(cell)
    return columns
