"""A folder of lm-eval: results_DATE.json and, with --log_samples, samples_TASK_DATE.jsonl, a line
for each problem and filter. Paths in them, such as that of a model, are shown and never opened."""

import hashlib
import re
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from pydantic_core import from_json

from cera_train.common.files import read_parsed
from cera_train.common.settings import flatten, require
from cera_train.report.readers.files import files_in, is_score, safe_name
from cera_train.report.runs import Evaluation, Run, Scores
from cera_train.runs.records import RESTORE, Record, read_trees

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-[^_]+)\.jsonl", re.DOTALL)
MOST_NAMED = 5  # metrics in a note
DIGEST = 16  # digits that tell texts apart


class Results(Record):
    """results_DATE.json: how the tasks were asked."""

    base: str | None = Field(alias="model_name", default=None)
    shots: dict[str, Any] = Field(alias="n-shot", default_factory=dict)  # by task
    versions: dict[str, Any] = Field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    higher_is_better: dict[str, dict[str, Any]] = Field(default_factory=dict)  # task -> metric
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None


class SampleLine(Record):
    """A line of samples_TASK_DATE.jsonl."""

    fix: ClassVar[str] = "Evaluate again, by a newer lm-eval."

    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    filter: str  # how the answer is found in a text, such as strict-match, or none
    metrics: list[str]

    @property
    def problem(self) -> str:
        """Equal for the same question with the same right answer."""
        return f"{self.doc_id} {self.doc_hash[:DIGEST]} {self.target_hash[:DIGEST]}"


def find_lm_eval_run(folder: Path) -> Run | None:
    """The run in a folder, or in the folder that lm-eval made in it, named after the model. Of two
    evaluations on a task the newest counts."""
    found = files_in(folder, "samples_*.jsonl") or files_in(folder, "*/samples_*.jsonl")
    files = {file: match for file in found if (match := SAMPLES.fullmatch(file.name))}
    if len({file.parent for file in files}) != 1:
        return None  # of no model, or of several
    newest = {
        files[file]["task"]: file for file in sorted(files, key=lambda file: files[file]["date"])
    }
    evaluations: dict[str, Evaluation] = {}
    notes: list[str] = []
    base = None
    for task, file in sorted(newest.items()):
        path = file.with_name(f"results_{files[file]['date']}.json")
        results = Results()
        if path in files_in(file.parent, "results_*.json"):
            results = Results.from_json(read_parsed(path, from_json, RESTORE), path)
            base = results.base
        evaluations |= read_samples(file, task, results, notes)
    name = safe_name(folder.resolve().name)
    return Run(folder, name, {"model.path": base}, evaluations=evaluations, notes=notes)


def read_samples(
    file: Path, task: str, results: Results, notes: list[str]
) -> dict[str, Evaluation]:
    """An evaluation for each metric of a task, graded by each filter. Notes the metrics that it
    leaves out."""
    directions = results.higher_is_better.get(task, {})
    metrics: dict[str, dict[str, Scores]] = {}  # metric -> filter -> problem -> score
    left_out: dict[str, None] = {}
    prompts = set[str]()
    for place, tree in read_trees(file):
        sample = SampleLine.from_json(tree, place)
        prompts.add(sample.prompt_hash)
        for metric in sample.metrics:
            value = tree.get(metric)
            if directions.get(metric) is False or not is_score(value):
                left_out[metric] = None
                continue
            scores = metrics.setdefault(metric, {}).setdefault(safe_name(sample.filter), {})
            require(
                sample.problem not in scores,
                f"{place}: doc_id {sample.doc_id} comes again: the file holds two evaluations. "
                "Keep the lines of one.",
            )
            scores[sample.problem] = float(value)
    if left_out:
        names = ", ".join(map(safe_name, list(left_out)[:MOST_NAMED]))
        notes.append(
            f"{safe_name(task)} is compared without metrics that are not a number from 0 to 1 for "
            f"each problem, better where it is higher: {names}."
        )
    same = {
        "shots": str(results.shots.get(task)),
        "versions of the task": str(results.versions.get(task)),
    }
    generation = results.configs.get(task, {}).get("generation_kwargs") or {}
    settings = {
        # They may differ by the chat templates of two models.
        "prompts": hashlib.sha256("".join(sorted(prompts)).encode()).hexdigest()[:DIGEST],
        "chat template": results.chat_template_sha,
        "system instruction": results.system_instruction_sha,
        **flatten({"generation": generation}),
    }
    return {
        safe_name(f"{task} {metric}"): Evaluation.of_scores(scores, same=same, settings=settings)
        for metric, scores in metrics.items()
        if metric not in left_out
    }
