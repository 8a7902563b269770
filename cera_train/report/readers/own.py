"""The folder of a run of cera-train, or of an adapter or a base model with evaluations."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from cera_train.common.files import read_json, read_yaml
from cera_train.common.settings import flatten, to_plain
from cera_train.common.trust import clean
from cera_train.report.runs import Evaluation, Figure, Metric, Run, Scores, Settings, group_by
from cera_train.runs.evaluation_folder import (
    CHAT,
    AccuracyResult,
    Grade,
    PerplexityResult,
    Problem,
    find_evaluation_result,
)
from cera_train.runs.records import Record, load_config, read_lines
from cera_train.runs.results import (
    DIVERGED,
    METRICS,
    SPECTRUM,
    RunResult,
    environment_of,
    read_metrics,
)

PERPLEXITIES = {
    "perplexity": "perplexity",
    "perplexity_base": "perplexity without adapter",
}
"""Fields of a PerplexityResult -> their labels."""


def find_own_run(folder: Path) -> Run | None:
    """The run or the evaluations in a folder; None where there is neither."""
    path = folder / "config.yaml"
    evaluations = {
        file.parent.name: read_evaluation(file.parent)
        for file in sorted(folder.glob("eval/*/config.yaml"))
    }
    # The config.yaml of an evaluation has no adapter.
    if not path.is_file() or "adapter" not in read_yaml(path):
        return _without_training(folder, evaluations) if evaluations else None
    config = load_config(path)
    # no picture can show half of a surrogate pair
    settings = flatten(to_plain(config))
    name = clean(config.name)
    return Run(
        folder,
        name,
        settings,
        config.adapter,
        evaluations,
        is_training=True,
        has_diverged=(folder / DIVERGED).exists(),
        result=RunResult.find(folder / "result.json"),
        metrics=read_metrics(folder / METRICS),
        environment=environment_of(folder),
        spectrum=mean_spectrum(folder / SPECTRUM),
    )


def _without_training(folder: Path, evaluations: dict[str, Evaluation]) -> Run:
    """The folder of an adapter from elsewhere, or of a base model, known by its evaluations."""
    evaluation = next(iter(evaluations.values()))
    settings = {
        key: value for key, value in evaluation.settings.items() if key.startswith("model.")
    }
    is_base = evaluation.settings.get("adapter_digest") is None
    name = folder.resolve().name
    return Run(folder, name, settings, evaluations=evaluations, is_base=is_base)


class SpectrumRecord(Record, extra="allow"):
    """A module in spectrum.json."""

    singular_values: list[float]  # those of the centred branch output, descending


def mean_spectrum(path: Path) -> list[float]:
    """Singular values divided by their sum, averaged over the modules of a spectrum.json, as the
    paper draws them; a module with fewer directions counts as zero beyond them. Empty without the
    file."""
    if not path.is_file():
        return []
    normalized = []
    for name, module in read_json(path).items():
        values = SpectrumRecord.from_json(module, f"{path}: {name}").singular_values
        total = sum(values)
        normalized.append([value / total if total > 0 else 0.0 for value in values])
    return [
        sum(column) / len(normalized)
        for column in itertools.zip_longest(*normalized, fillvalue=0.0)
    ]


# --- evaluations ----------------------------------------------------------------------------------


def read_evaluation(folder: Path) -> Evaluation:
    """RUN/eval/NAME."""
    settings: Settings = flatten(read_yaml(folder / "config.yaml"))
    result = find_evaluation_result(folder)
    if result is None:
        return Evaluation({}, settings=settings)
    if isinstance(result, PerplexityResult):
        figures = {
            Metric(label, is_share=False): Figure(getattr(result, field))
            for field, label in PERPLEXITIES.items()
        }
        return Evaluation(figures, settings=settings)
    problems = read_lines(folder / "problems.jsonl", Problem)
    is_chat = any(getattr(problem, CHAT, False) for problem in problems)
    same = {
        "engines": settings.get("engine") or "this program",
        "prompts": "chat markup" if is_chat else "plain text",
    }
    scores = _paired_scores(folder)
    return Evaluation(dict(_figures(result)), scores, same, settings=settings)


def _figures(result: AccuracyResult) -> Iterator[tuple[Metric, Figure]]:
    """Pass@1 and pass@n of n samples by each grader, and the shares that the task adds."""
    first = "/pass@1"
    last = f"/pass@{result.samples}"
    accuracies = result.accuracies
    rates = [key for key in accuracies if key.endswith((first, last))]
    rates.sort(key=lambda key: (not key.endswith(first), key))
    shares = [
        key
        for key, value in result.details.items()
        if isinstance(value, float) and key not in accuracies and not key.startswith("ending/")
    ]
    for key in [*rates, *shares]:
        label = re.sub("[/_]", " ", re.sub("/(pass@1|mean)$", "", key))
        yield Metric(label), Figure(result.figure(key), accuracies.get(key))


def _paired_scores(folder: Path) -> dict[str, Scores]:
    """Scores by each rule that graded all answers: those of an answer's parts, math-verify's
    verdicts, the exact rule; the mean over the samples of a problem."""
    grades = read_lines(folder / "grades.jsonl", Grade)
    by_problem = group_by(grades, lambda grade: grade.problem)
    return {
        rule: {
            problem: fmean(getattr(grade, rule) for grade in samples)
            for problem, samples in by_problem.items()
        }
        for rule in ("score", "verified", "exact")
        if all(getattr(grade, rule) is not None for grade in grades)
    }
