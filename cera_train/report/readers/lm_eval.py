"""A folder of lm-eval: results_DATE.json and, with --log_samples, samples_TASK_DATE.jsonl, a line
for each problem and filter. Paths in them, such as that of a model, are shown and never opened."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cera_train.common.settings import flatten, require
from cera_train.evaluation.grading import is_loop
from cera_train.report.readers.files import (
    files_in,
    is_score,
    read_object,
    read_objects,
    safe_name,
)
from cera_train.report.runs import Evaluation, Run, Scores
from cera_train.runs.evaluation_folder import LOOP, RIGHT, WRONG
from cera_train.runs.records import Record

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-[^_]+)\.jsonl", re.DOTALL)
ENDINGS = (RIGHT, WRONG, LOOP)  # what a text alone tells
MOST_NAMED = 5  # metrics in a note
DIGEST = 16  # digits that tell texts apart


class Results(Record):
    """results_DATE.json: how the tasks were asked."""

    shots: dict[str, Any] = Field(alias="n-shot", default_factory=dict)  # by task
    versions: dict[str, Any] = Field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    higher_is_better: dict[str, dict[str, Any]] = Field(default_factory=dict)  # task -> metric
    config: dict[str, Any] = Field(default_factory=dict)
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None

    @property
    def base(self) -> str | None:
        """The model in `pretrained=MODEL,dtype=...`, or in names and values."""
        arguments = self.config.get("model_args")
        if isinstance(arguments, str):
            arguments = dict(word.partition("=")[::2] for word in arguments.split(","))
        return arguments.get("pretrained") if isinstance(arguments, dict) else None


class SampleLine(Record):
    """One line."""

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


def find_run(folder: Path) -> Run | None:
    """The run in a folder, or in the folder that lm-eval made in it, named after the model."""
    found = files_in(folder, "samples_*.jsonl") or files_in(folder, "*/samples_*.jsonl")
    files = [file for file in found if SAMPLES.fullmatch(file.name)]
    if not files:
        _require_samples(folder)
    if len({file.parent for file in files}) != 1:
        return None  # of no model, or of several
    names = {file: SAMPLES.fullmatch(file.name).groupdict() for file in files}
    files.sort(key=lambda file: names[file]["date"])
    newest = {names[file]["task"]: file for file in files}
    evaluations: dict[str, Evaluation] = {}
    notes = []
    base = None
    for task, file in sorted(newest.items()):
        results = None
        for path in files_in(file.parent, f"results_{names[file]['date']}.json"):
            results = Results.from_json(read_object(path), path)
            base = results.base
        samples = Samples(task, results, file)
        evaluations |= samples.evaluations
        notes += samples.notes
    if len(files) > len(newest):
        notes.append(f"{folder} has several evaluations on a task, of which the newest counts.")
    name = safe_name(folder.resolve().name)
    return Run(folder, name, {"model.path": base}, evaluations=evaluations, notes=notes)


def _require_samples(folder: Path) -> None:
    """Raises UserError for a folder of lm-eval without answers."""
    for path in files_in(folder, "results_*.json"):
        require(
            not {"results", "n-shot"} <= read_object(path).keys(),
            f"{folder} has results of lm-eval and no samples_*.jsonl, so problems cannot be "
            "compared: repeat lm_eval with --log_samples.",
        )


class Samples:
    """samples_TASK_DATE.jsonl: an evaluation for each metric, graded by each filter."""

    def __init__(self, task: str, results: Results | None, file: Path) -> None:
        self.task = task
        self.results = results or Results()
        self.has_results = results is not None
        directions = self.results.higher_is_better.get(task, {})
        self.costs = {metric for metric, is_higher in directions.items() if is_higher is False}
        # metric -> filter -> problem -> score
        self.scores: dict[str, dict[str, Scores]] = {}
        self.prompts: dict[str, str] = {}  # by problem
        self.endings = Counter[str]()  # by the first metric and filter
        self.left_out: dict[str, None] = {}  # metrics, in their order
        for place, tree in read_objects(file):
            self.add(place, tree)

    def add(self, place: str, tree: dict[str, Any]) -> None:
        """Counts a line."""
        sample = SampleLine.from_json(tree, place)
        problem = sample.problem
        self.prompts.setdefault(problem, sample.prompt_hash[:DIGEST])
        for number, metric in enumerate(sample.metrics):
            value = tree.get(metric)
            if metric in self.costs or not is_score(value):
                self.left_out[metric] = None
                continue
            by_filter = self.scores.setdefault(metric, {})
            scores = by_filter.setdefault(sample.filter, {})
            require(
                problem not in scores,
                f"{place}: doc_id {sample.doc_id} comes again: the file holds two evaluations. "
                "Keep the lines of one.",
            )
            scores[problem] = float(value)
            text = generated_text(tree)
            if text is not None and number == 0 and len(by_filter) == 1:
                self.endings[RIGHT if value == 1 else LOOP if is_loop(text) else WRONG] += 1

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By task and metric."""
        config = self.results.configs.get(self.task, {})
        prompts = hashlib.sha256(json.dumps(sorted(self.prompts.items())).encode()).hexdigest()
        same = {"prompts": prompts[:DIGEST]}
        if self.has_results:
            # Prompts may differ by the chat templates of two models.
            same = {
                "shots": str(self.results.shots.get(self.task)),
                "versions of the task": str(self.results.versions.get(self.task)),
                "filters": json.dumps(config.get("filter_list")),
            }
        settings = {
            "prompts": prompts[:DIGEST],
            "chat template": self.results.chat_template_sha,
            "system instruction": self.results.system_instruction_sha,
            **flatten({"generation": config.get("generation_kwargs") or {}}),
        }
        shares = {}
        if answers := self.endings.total():
            shares = {ending: self.endings[ending] / answers for ending in ENDINGS}
        return {
            safe_name(f"{self.task} {metric}"): Evaluation.of_scores(
                {safe_name(name): scores for name, scores in by_filter.items()},
                endings=shares if number == 0 else {},
                same=same,
                settings=settings,
            )
            for number, (metric, by_filter) in enumerate(self.scores.items())
            if metric not in self.left_out
        }

    @property
    def notes(self) -> list[str]:
        if not self.left_out:
            return []
        metrics = ", ".join(map(safe_name, list(self.left_out)[:MOST_NAMED]))
        return [
            f"{safe_name(self.task)} is compared without metrics that are not a number from 0 to 1 "
            f"for each problem, better where it is higher: {metrics}."
        ]


def generated_text(tree: dict[str, Any]) -> str | None:
    """The text of an answer; None where the model chose among given ones."""
    match tree:
        case {"arguments": {"gen_args_0": {"arg_1": dict()}}, "resps": [[str(text), *_], *_]}:
            return text
    return None
