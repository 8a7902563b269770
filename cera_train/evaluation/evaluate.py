"""Evaluation, top to bottom: generate answers and grade them, or measure perplexity; write and
print the result. A run's folder is all it needs: the folder holds the config."""

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from cera_train.adapters.saved import keeps_base
from cera_train.adapters.spectrum import spectrum_metrics
from cera_train.common.settings import require
from cera_train.common.terminal import (
    ProgressBar,
    announce,
    counted,
    print_fields,
    print_line,
    time_left,
)
from cera_train.distributed.accelerator import prepare_memory, quiet_libraries, start_accelerator
from cera_train.distributed.processes import in_processes, is_main_process
from cera_train.evaluation.engine import (
    Engine,
    answer_share,
    choose_dtype,
    load_subject,
    open_server,
)
from cera_train.evaluation.grading import grade_all
from cera_train.evaluation.held_out import probe_spectra, token_losses
from cera_train.evaluation.requests import Answer, requests_for
from cera_train.evaluation.server import Server
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    Task,
    build_task,
    describe_trained_on,
    load_problems,
    mean,
)
from cera_train.model.batches import MicroBatches
from cera_train.model.folder import load_tokenizer
from cera_train.model.language_model import perplexity
from cera_train.model.layout import choose_layout
from cera_train.runs.evaluation_folder import (
    ENDINGS,
    AccuracyResult,
    EvaluationFolder,
    Generation,
    Grade,
    Key,
    PerplexityResult,
    Problem,
    find_evaluation_result,
)
from cera_train.runs.results import describe_rank
from cera_train.runs.subject import Subject, digest_of, find_subject
from cera_train.settings.distributed import DistributedConfig, ProcessesConfig
from cera_train.settings.evaluation import EvalConfig
from cera_train.verdicts.interval import accuracy_interval, pass_at_k


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A subject, and a task to measure it on. Built once by the command, and passed to every
    process that it starts."""

    config: EvalConfig
    subject: Subject
    task: Task
    problems: list[Problem]  # empty for a task that measures perplexity

    @property
    def launch(self) -> ProcessesConfig:
        return self.config.launch


def resolve_evaluation(config: EvalConfig) -> ResolvedEvaluation:
    """Finds the subject, builds the task and reads its problems. Raises UserError where they cannot
    be used."""
    subject = find_subject(config)
    task = build_task(config.task)
    problems = []
    if isinstance(task, AnswerTask):
        is_on_hub = config.task.path is not None and not config.task.files
        if is_on_hub and is_main_process():
            announce("reading", f"the problems of {config.task.path}")
        problems = load_problems(task, subject.data, load_tokenizer(subject.model))
    return ResolvedEvaluation(config, subject, task, problems)


def start_evaluation(config: EvalConfig) -> None:
    """Runs an evaluation in `launch.processes` processes."""
    in_processes(run_evaluation, resolve_evaluation(config))


def run_evaluation(evaluation: ResolvedEvaluation) -> dict[str, Any]:
    """Measures a subject on a task, or resumes where an earlier call was cut. Answers that are
    there are graded again.

    Returns:
        The content of result.json, such as `exact/pass@1` or `perplexity`, by the kind of task.

    Raises:
        UserError: the model, its adapter, a server or the evaluation's folder cannot be used.
    """
    quiet_libraries()
    prepare_memory()
    config = evaluation.config
    subject = evaluation.subject
    name = config.folder_name
    if config.name is None:
        name += subject.part
    path = subject.folder / "eval" / name
    if config.server is None:  # else the server chooses
        subject = choose_dtype(subject)
    # Answers differ in length, so one process may wait hours for another.
    accelerator = start_accelerator(
        subject.model, subject.train.autocast, DistributedConfig(timeout=86_400)
    )
    is_main = accelerator.is_main_process
    engine = None
    computes = str(subject.model.dtype)
    with EvaluationFolder.open(path, accelerator.process_index) as folder:
        if config.server is not None:
            engine = open_server(config.server, subject)
            computes = f"{engine.version} at {engine.url}"
        config = replace(
            config,
            name=name,
            model=subject.model,
            adapter_digest=digest_of(subject.adapter) if subject.adapter else None,
            engine=engine and engine.version,
        )
        if is_main:
            folder.write_config(config)
            print_line("evaluate", f"{subject}, on {config.task.name}, {computes}")
        accelerator.wait_for_everyone()
        evaluation = replace(evaluation, config=config, subject=subject)
        if isinstance(evaluation.task, AnswerTask):
            result = answer_and_grade(evaluation, folder, accelerator, engine)
            lines = accuracy_lines(evaluation.task, result) if is_main else {}
        else:
            result = measure_perplexity(evaluation, folder, accelerator)
            lines = perplexity_lines(result)
        if is_main:
            result.write(path / "result.json")
            print()
            print_fields(lines | {"folder": str(path)})
        return result.to_json()


# --- accuracy -------------------------------------------------------------------------------------


def answer_and_grade(
    evaluation: ResolvedEvaluation,
    folder: EvaluationFolder,
    accelerator: Accelerator,
    engine: Server | None,
) -> AccuracyResult:
    """Generates the missing answers, then grades all of them; the main process alone has the
    result.

    Args:
        engine: None: the model in this process.
    """
    task = evaluation.task
    config = evaluation.config
    subject = evaluation.subject
    problems = evaluation.problems
    is_main = accelerator.is_main_process
    if is_main:
        folder.write_problems(problems)
    answers = folder.answers()
    accelerator.wait_for_everyone()  # nobody writes while others read
    keys = [
        (problem.id, sample) for problem in problems for sample in range(config.generation.samples)
    ]
    missing = {key for key in keys if key not in answers}
    if missing:
        data = subject.data if subject.adapter else None
        if is_main and data and (shared := describe_trained_on(problems, data)):
            print_line("shared", shared)
        engine = engine or load_subject(subject, accelerator.device)
        try:
            generate_answers(evaluation, missing, engine, folder, accelerator)
        except (KeyboardInterrupt, SystemExit):
            if is_main:
                print_line("stopped", "the answers so far are kept. The same command resumes.")
            raise
    accelerator.wait_for_everyone()
    if not is_main:
        return AccuracyResult()

    recorded = folder.answers()
    answers = [recorded[key] for key in keys]
    folder.write_answers(answers)
    if task.is_verified:
        announce("grading", f"{counted(len(answers), 'answer')} by math-verify")
    grades = grade_all(task, problems, answers)
    folder.write_grades(grades)
    return score(task, problems, answers, grades).replace(
        task=config.folder_name,
        kind=config.task.kind,
        problems=len(problems),
        samples=config.generation.samples,
    )


def generate_answers(
    evaluation: ResolvedEvaluation,
    missing: Collection[Key],
    engine: Engine,
    folder: EvaluationFolder,
    accelerator: Accelerator,
) -> None:
    """Appends this process's share of the missing answers to its file, as they come. The main
    process shows how many are exact."""
    task = evaluation.task
    settings = evaluation.config.task
    generation = evaluation.config.generation
    room = settings.max_new_tokens
    requests = [
        request
        for request in requests_for(
            evaluation.problems, generation.samples, engine.tokenizer, room, engine.positions
        )
        if request.key in missing
    ]
    by_id = {problem.id: problem for problem in evaluation.problems}
    processes = accelerator.num_processes
    share = math.ceil(len(requests) / processes)
    sharing = f" in this process, {processes - 1} more at work" if processes > 1 else ""
    are_exact: list[bool] = []
    started = time.perf_counter()

    def keep(ended: list[Answer]) -> None:
        generations = [each.generation for each in ended]
        folder.append_answers(generations)
        are_exact.extend(task.grade(by_id[each.problem], each).exact for each in generations)
        seconds = (time.perf_counter() - started) / len(are_exact)
        left = time_left(seconds * max(share - len(are_exact), 0))
        progress.step(f"exact {mean(are_exact):.1%}{sharing}{left}", len(ended))

    with closing(ProgressBar("answer", share, 0, visible=accelerator.is_main_process)) as progress:
        answer_share(engine, requests, room, settings.stop, generation, accelerator, keep)


def score(
    task: AnswerTask,
    problems: Sequence[Problem],
    answers: Sequence[Generation],
    grades: Sequence[Grade],
) -> AccuracyResult:
    """The scores of an evaluation: pass@k for every k up to the number of samples, with its 95 %
    interval, the share of the answers that ended in each way, and what the task adds."""
    figures = task.scores(problems, grades)
    for grader in task.graders:
        by_problem: dict[str, list[bool]] = {}
        for grade in grades:
            by_problem.setdefault(grade.problem, []).append(getattr(grade, grader))
        for k in range(1, min(map(len, by_problem.values())) + 1):
            values = [pass_at_k(len(correct), sum(correct), k) for correct in by_problem.values()]
            figures[f"{grader}/pass@{k}"] = mean(values)
            figures[f"{grader}/pass@{k}/interval"] = [*accuracy_interval(values)]
    endings = Counter(grade.ending for grade in grades)
    figures |= {f"ending/{name}": endings[name] / len(grades) for name in ENDINGS}
    return AccuracyResult(
        truncated=sum(answer.truncated for answer in answers),
        no_answer=sum(grade.answer is None for grade in grades),
        grader_failures=sum(grade.failure is not None for grade in grades),
        tokens=sum(answer.tokens for answer in answers),
        **figures,
    )


def accuracy_lines(task: AnswerTask, result: AccuracyResult) -> dict[str, str]:
    """Labels and texts to print."""
    is_sampled = result.samples > 1
    lines = {"problems": f"{result.problems:,}"}
    if is_sampled:
        lines["problems"] += f", {result.samples:,} answers each"
    for key, interval in result.accuracies.items():
        label = key.replace("/", " ") if is_sampled else key.removesuffix("/pass@1")
        lines[label] = f"{result.details[key]:.1%}"
        if interval is not None:
            lines[label] += "  (95 % interval {:.1%} to {:.1%})".format(*interval)
    lines |= task.lines(result.details)
    lines["answers"] = ", ".join(f"{name} {share:.1%}" for name, share in result.endings.items())
    lines |= {"no answer": f"{result.no_answer:,}", "grader failed": f"{result.grader_failures:,}"}
    return lines


# --- perplexity -----------------------------------------------------------------------------------


def measure_perplexity(
    evaluation: ResolvedEvaluation, folder: EvaluationFolder, accelerator: Accelerator
) -> PerplexityResult:
    """Measures perplexity with the adapter and without it, and on rows the spectra; once, then it
    is on record."""
    config = evaluation.config
    subject = evaluation.subject
    data = config.data or subject.data
    tokenizer = load_tokenizer(subject.model)
    rows = evaluation.task.rows(data, subject.model, tokenizer)
    if (before := find_evaluation_result(folder.path)) is not None:
        require(
            before.rows_digest == rows.digest,
            f"{folder.path} has the perplexity of other rows: a data file, the tokenizer or its "
            "chat template changed. Restore it, or set name=... for another folder.",
        )
        return before
    language_model = load_subject(subject, accelerator.device).language_model
    choose_layout(language_model)
    micro_batch_tokens = max(subject.train.micro_batch_tokens, *rows.column("length"))
    is_flat = language_model.is_flat
    batches = MicroBatches(rows, is_flat, micro_batch_tokens, accelerator.device)
    measured = (language_model, batches, accelerator)
    loss_per_token = token_losses(*measured).mean
    result = PerplexityResult(
        task=config.folder_name,
        kind="perplexity",
        perplexity=perplexity(loss_per_token),
        loss=loss_per_token,
        rows=len(rows),
        tokens=sum(batches.supervised),
        rows_digest=rows.digest,
    )
    if subject.adapter is not None:
        model = language_model.model
        if keeps_base(model):
            with model.disable_adapter():
                result.perplexity_base = perplexity(token_losses(*measured).mean)
        if config.task.window is None:
            result = result.replace(**spectrum_metrics(probe_spectra(*measured)))
    return result


def perplexity_lines(result: PerplexityResult) -> dict[str, str]:
    """Labels and texts to print."""
    lines = {"perplexity": f"{result.perplexity:.3f}"}
    if result.perplexity_base is not None:
        lines["without adapter"] = f"{result.perplexity_base:.3f}"
    if rank := describe_rank(result.spectrum):
        lines["effective rank"] = rank
    lines["tokens"] = f"{result.tokens:,} predicted, in {result.rows:,} rows"
    return lines
