"""Run folders by hand, in the format that training and evaluation leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from cera_train.evaluation.statistics import bootstrap_interval
from cera_train.report.page import run_rows
from cera_train.report.runs import read_runs

PROBLEMS = 40

HOSTILE = "<script>alert(1)|`*_[x](javascript:alert(2))\nnew \"line\" 'x' $x^2$ & {{ 7 * 7 }}"
"""A text that would be a script, a link, a table or a formula."""


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """A config.yaml, with dotted keys changed."""
    tree: dict[str, Any] = {
        "model": {"path": "meta-llama/Llama-3.1-8B", "revision": None, "dtype": "bfloat16", "quantization": "none"},
        "adapter": {"kind": "cera", "r": 64, "alpha": None, "dropout": 0.1, "activation": "silu"},
        "data": {"layout": "text", "path": "TIGER-Lab/MathInstruct", "train_split": "train[:100000]",
                 "eval_split": "train[100000:102000]", "loss_on": "all", "max_length": 512,
                 "prompt": "{q}", "completion": "{a}"},
        "optimizer": {"kind": "adamw", "lr": 3e-4},
        "train": {"batch_size": 64, "seed": 0},
        "tracker": {"kinds": {}},
        "name": name,
        "output_dir": "outputs",
        "published": {},
    }  # fmt: skip
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def result_of(kind: str, r: int, perplexity: float) -> dict[str, Any]:
    return {
        "eval/perplexity": perplexity,
        "perplexity_before": 3.5,
        "best_perplexity": perplexity - 0.1,
        "best_update": 80,
        "spectrum/effective_rank/mean": r * 0.4,
        "spectrum/effective_rank/max": r * 0.6,
        "spectrum/manifold_dimension/mean": r * 0.2,
        "spectrum/manifold_dimension/max": r // 3,
        "spectrum/linear_share/mean": 0.9,
        "adapter_kind": kind,
        "adapter_r": r,
        "trainable_parameters": 425984 * r,
        "trainable_share": 0.0034,
        "updates": 100,
        "epochs": 1.5,
        "tokens": 123456,
        "tokens_per_s": 1234.5,
        "seconds": 3725.4,
        "peak_memory_bytes": 5 * 2**30,
        "folder": "outputs/x",
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(path: Path, perplexity: float = 1.9, finished: bool = True, **changes: Any) -> Path:
    """The folder of a training run; `changes` are settings with dotted keys."""
    name = changes.pop("name", path.name)
    path.mkdir(parents=True)
    settings = settings_of(name, **changes)
    (path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (path / "environment.json").write_text(
        json.dumps({"command": ["/opt/bin/cera-train", "+recipe=math_r64", f"name={name}"]})
    )
    r, kind = settings["adapter"]["r"], settings["adapter"]["kind"]
    lines: list[dict[str, Any]] = []
    for update in range(0, 101, 10):
        value = perplexity + 1.6 * (1 - update / 100)
        if update:
            speed = {"train/seconds": 6.0 * update, "train/tokens_per_s": 1000.0 + update}
            lines.append({"update": update, "epoch": 0, "train/loss": math.log(value) + 0.02} | speed)
        if update % 20 == 0:
            lines.append({"update": update, "epoch": 0, "eval/loss": math.log(value), "eval/perplexity": value,
                          "spectrum/effective_rank/mean": r * 0.004 * update,
                          "spectrum/linear_share/mean": 1 - update / 1000 if update else None})  # fmt: skip
    if not finished:
        lines = [line for line in lines if line["update"] <= 50]
    write_lines(path / "metrics.jsonl", lines)
    if finished:
        spectrum = {
            f"model.layers.{layer}.self_attn.q_proj": {
                "effective_rank": r * 0.4, "manifold_dimension": r // 5, "dead_units": None,
                "singular_values": [math.exp(-k / (r / (3 + layer))) for k in range(r)],
            }
            for layer in range(2)
        }  # fmt: skip
        (path / "spectrum.json").write_text(json.dumps(spectrum))
        (path / "result.json").write_text(json.dumps(result_of(kind, r, perplexity)))
    return path


def add_evaluation(
    run: Path,
    task: str = "gsm8k",
    solved: Any = frozenset(),
    verified: Any = None,
    problems: int = PROBLEMS,
    samples: int = 1,
    finished: bool = True,
    question: str = "What is {n} + 1?",
    text: str = "It is {n}.\n#### {n}",
    **changes: Any,
) -> Path:
    """Answers to a task.

    Args:
        solved: the problems answered right, or a function of problem and sample.
        verified: the same for the second grader; None: as solved; False: it did not look.
    """
    folder = run / "eval" / task
    folder.mkdir(parents=True)
    kind = task if task in ("math", "gsm8k", "logistic_map") else "math"
    settings = {"run": str(run), "name": None, "adapter_digest": str(run), "data": None,
                "model": {"path": "meta-llama/Llama-3.1-8B"},
                "task": {"kind": kind, "name": task, "limit": problems, "max_new_tokens": 512},
                "generation": {"samples": samples, "temperature": 0.8 if samples > 1 else 0.0}}  # fmt: skip
    for key, value in changes.items():
        section, last = key.split(".")
        settings[section][last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    is_right = solved if callable(solved) else lambda n, sample: n in solved
    if verified is None:
        verified = solved
    is_verified = verified if callable(verified) or verified is False else lambda n, sample: n in verified
    rows = [
        {"id": f"id{n:03}", "question": question.format(n=n), "prompt": "Q", "gold": str(n + 1)}
        for n in range(problems)
    ]
    write_lines(folder / "problems.jsonl", rows)
    keys = [(n, sample) for n in range(problems) for sample in range(samples)]
    if not finished:
        return folder
    answers = [str(n + 1) if is_right(n, sample) else "7" for n, sample in keys]
    write_lines(
        folder / "generations.jsonl",
        [{"problem": f"id{n:03}", "sample": sample, "text": text.format(n=answer), "tokens": 9, "truncated": False}
         for (n, sample), answer in zip(keys, answers, strict=True)],
    )  # fmt: skip
    grades = [
        {"problem": f"id{n:03}", "sample": sample, "answer": answer, "exact": is_right(n, sample),
         "verified": None if is_verified is False else is_verified(n, sample), "failure": None}
        for (n, sample), answer in zip(keys, answers, strict=True)
    ]  # fmt: skip
    write_lines(folder / "grades.jsonl", grades)
    result = {"task": task, "kind": kind, "problems": problems, "samples": samples}
    for grader in ("exact",) if is_verified is False else ("exact", "verified"):
        result |= pass_rates(grader, grades, samples)
    result |= {"truncated": 0, "no_answer": 0, "grader_failures": 0, "tokens": 99, "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def pass_rates(grader: str, grades: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """pass@1 and, of several samples, pass@k, with their intervals; `grades` problem by problem."""
    shares = [sum(row[grader] for row in grades[n : n + samples]) / samples for n in range(0, len(grades), samples)]
    rates = {
        f"{grader}/pass@1": sum(shares) / len(shares),
        f"{grader}/pass@1/interval": list(bootstrap_interval(shares)),
    }
    if samples > 1:
        rates[f"{grader}/pass@{samples}"] = sum(share > 0 for share in shares) / len(shares)
        rates[f"{grader}/pass@{samples}/interval"] = [0.0, 1.0]
    return rates


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Of 40 problems both solve 10, only the first 12, only the second 9, and neither 9."""
    published = {"math/exact/pass@1": 0.1636, "eval/perplexity": 1.97}
    first = make_run(folder / "cera_64", 1.85, published=published)
    second = make_run(folder / "lora_512", 2.02, **{"adapter.kind": "lora", "adapter.r": 512})
    add_evaluation(first, "math", solved=set(range(22)))
    add_evaluation(second, "math", solved=set(range(10)) | set(range(22, 31)))
    return first, second


def cells(*folders: Path) -> dict[str, list[str]]:
    """Columns by label, in the order of the runs."""
    rows = run_rows(read_runs(folders))
    return {name: [row[name] for row in rows] for name in rows[0]}
