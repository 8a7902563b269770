"""Evaluation, top to bottom: load the model; generate answers and grade them, or measure perplexity; write and print
the result. A run's folder is all it needs: the folder holds the config."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from cera_train.adapters.saved import attach, keeps_base
from cera_train.adapters.spectrum import spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.terminal import ProgressBar, duration, print_fields, print_line
from cera_train.data.prepare import TokenizedRows
from cera_train.distributed.accelerator import Team, peak_memory, quiet_libraries, start_accelerator
from cera_train.distributed.launch import in_processes
from cera_train.evaluation.generate import check_room, cut_batches, generate, prepare_generation, requests_for
from cera_train.evaluation.grading import grade_all, score
from cera_train.evaluation.held_out import HeldOut
from cera_train.evaluation.tasks.task import AnswerTask, Task, load_problems, task_of
from cera_train.model.loss import SupervisedLoss, choose_layout, perplexity
from cera_train.model.precision import choose_precision
from cera_train.model.weights import fingerprint, load_model, load_tokenizer
from cera_train.runs.card import write_card
from cera_train.runs.evaluation_folder import EvaluationFolder, Key, Problem, append_answers
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import AccuracyResult, PerplexityResult, RunResult
from cera_train.runs.subject import Subject, digest_of, find_subject
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.model import Dtype


@dataclass(frozen=True)
class Evaluation:
    """What is measured, on what, by whom."""

    task: Task
    config: EvalConfig
    subject: Subject
    folder: EvaluationFolder
    accelerator: Accelerator


def launch(config: EvalConfig) -> dict[str, Any]:
    """`evaluate`, in as many processes as `launch.processes` says."""
    return in_processes(evaluate, config) if config.grade is None else evaluate(config)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measures a run on a task, or resumes where an earlier call was cut.

    Returns:
        The content of result.json, such as `exact/pass@1` or `perplexity`, by the kind of task.

    Raises:
        UserError: the run, the task or its data cannot be used.
    """
    quiet_libraries()
    if config.grade is not None:
        return grade_again(Path(config.grade), config.grading_seconds)
    config, subject, path = resolve(config)
    # Answers differ in length, so one process may wait hours for another.
    accelerator = start_accelerator(subject.model, subject.train.autocast, timeout=timedelta(days=1))
    is_main = accelerator.is_main_process
    with EvaluationFolder(path, is_main, accelerator.process_index) as folder:
        task = task_of(config.task)
        if is_main:
            folder.write_config(config)
            measured = f"{subject.name}, {subject.model.path}, on {config.task.name}, {subject.model.dtype}"
            print_line("evaluate", measured)
        accelerator.wait_for_everyone()
        result = folder.result() if folder.is_finished() else None
        if result is None:
            measure = answer_and_grade if isinstance(task, AnswerTask) else measure_perplexity
            result = measure(Evaluation(task, config, subject, folder, accelerator))
            if is_main:
                write_result(folder, result)
        if is_main:
            print_result(task, result, path)
        return result.to_json()


def resolve(config: EvalConfig) -> tuple[EvalConfig, Subject, Path]:
    """The config as config.yaml records it, what is measured, and the evaluation's folder."""
    subject = find_subject(config)
    name = config.folder_name + (subject.part if config.name is None else "")
    digest = digest_of(subject.adapter) if subject.adapter else None
    path = subject.folder / "eval" / name
    subject = settled(subject, path / "config.yaml")
    return replace(config, name=name, model=subject.model, adapter_digest=digest), subject, path


def settled(subject: Subject, recorded: Path | None = None) -> Subject:
    """The subject in the precision that `model.dtype=auto` takes: as an evaluation in this folder was begun, else by
    this machine."""
    dtype = subject.model.dtype
    if dtype == Dtype.auto and recorded is not None and recorded.is_file():
        begun = load_config(recorded, EvalConfig)
        dtype = begun.model.dtype if begun.model else dtype
    return replace(subject, model=replace(subject.model, dtype=choose_precision(dtype).dtype))


def problems_of(config: EvalConfig, subject: Subject) -> list[Problem]:
    """The problems of an evaluation with answers."""
    return load_problems(config.task, subject.run.data if subject.run else None)


def rows_of(config: EvalConfig, subject: Subject) -> TokenizedRows:
    """The rows of an evaluation of perplexity."""
    data = config.data or (subject.run.data if subject.run else None)
    return task_of(config.task).rows(config.task, data, subject.model, load_tokenizer(subject.model))


def load_subject(subject: Subject, device: torch.device) -> tuple[Any, PreTrainedModel]:
    """The model with its adapter, and the transformers model inside it. Without an adapter, the same model twice."""
    base = load_model(subject.model, device)
    if subject.adapter is None:
        return base.eval(), base
    record = subject.folder / "environment.json"
    if subject.run is not None and subject.run.model.dtype == subject.model.dtype and record.is_file():
        # models of one shape load the same adapter
        expected = read_json(record).get("base_fingerprint")
        if expected not in (None, fingerprint(base)):
            raise UserError(
                f"{subject.adapter} was trained on other weights than those of {subject.model.path}: it belongs to "
                f"{subject.run.model.path} as it was then. Leave out model=, or name the model it was trained on."
            )
    return attach(base, subject.adapter).eval(), base


# --- answers and grades ----------------------------------------------------------------------------------------------


def answer_and_grade(evaluation: Evaluation) -> AccuracyResult:
    """Generates the missing answers, then grades all of them; the main process alone has the result."""
    config, folder, accelerator = evaluation.config, evaluation.folder, evaluation.accelerator
    is_main = accelerator.is_main_process
    problems = problems_of(config, evaluation.subject)
    if is_main:
        folder.write_problems(problems)
    answers, broken = folder.answers()
    for line in broken if is_main else []:
        print_line("note", f"{line}: its problem is answered again.")
    accelerator.wait_for_everyone()  # nobody writes while others read
    keys = [(problem.id, sample) for problem in problems for sample in range(config.generation.samples)]
    tokens_per_s = None
    if any(key not in answers for key in keys):
        with folder.append_to_answers() as file:
            try:
                process_speed = generate_missing(evaluation, problems, answers.keys(), file)
            except (KeyboardInterrupt, SystemExit):
                if is_main:
                    print_line("stopped", "every whole batch of answers is kept. The same command resumes.")
                raise
        process_speed = torch.tensor(process_speed, device=accelerator.device)
        tokens_per_s = accelerator.reduce(process_speed, reduction="sum").item()
    accelerator.wait_for_everyone()
    if not is_main:
        return AccuracyResult()
    answers, _ = folder.answers()
    folder.finish_answers(answers[key] for key in keys)
    graded = grade(evaluation.task, config, folder)
    return graded.replace(tokens_per_s=tokens_per_s, peak_memory_bytes=peak_memory(accelerator.device))


def generate_missing(evaluation: Evaluation, problems: Sequence[Problem], done: Container[Key], file: TextIO) -> float:
    """Appends this process's share of the missing answers to a file, batch by batch; returns its tokens per second.

    A batch that lacks one answer is generated whole, since the rounding of an answer depends on its batch.
    """
    config, accelerator, task = evaluation.config, evaluation.accelerator, evaluation.task
    tokenizer = load_tokenizer(evaluation.subject.model)
    model, base = load_subject(evaluation.subject, accelerator.device)
    max_new_tokens = config.task.max_new_tokens
    prepare_generation(base, tokenizer, max_new_tokens, config.task.stop)
    requests = requests_for(problems, config.generation.samples, tokenizer)
    check_room(requests, max_new_tokens, base)
    batches = cut_batches(requests, max_new_tokens, config.generation.batch_tokens)
    unfinished = [batch for batch in batches if any((request.problem, request.sample) not in done for request in batch)]
    mine = unfinished[accelerator.process_index :: accelerator.num_processes]

    by_id = {problem.id: problem for problem in problems}
    answered, correct, tokens, seconds = 0, 0, 0, 0.0
    total, others = sum(map(len, mine)), accelerator.num_processes - 1
    sharing = f" in this process, {others} more at work" if others else ""
    with contextlib.closing(ProgressBar("answer", total, 0, visible=accelerator.is_main_process)) as progress:
        for batch in mine:
            started = time.perf_counter()
            with accelerator.autocast():
                answers = generate(model, base, tokenizer, batch, config.generation)
            missing = [answer for answer in answers if (answer.problem, answer.sample) not in done]
            append_answers(file, missing)
            seconds += time.perf_counter() - started
            tokens += sum(answer.tokens for answer in missing)
            answered += len(answers)
            correct += sum(task.grade(by_id[answer.problem], answer).exact for answer in answers)
            left = duration(seconds / answered * (total - answered))
            progress.step(f"exact {correct / answered:.1%}{sharing}  {left} left", len(answers))
    return tokens / seconds if seconds else 0.0


def grade(task: AnswerTask, config: EvalConfig, folder: EvaluationFolder) -> AccuracyResult:
    """Grades the recorded answers and returns their scores; writes grades.jsonl once no answer is missing."""
    problems = {problem.id: problem for problem in folder.problems()}
    answers, _ = folder.answers()
    answers = [answer for answer in answers.values() if answer.problem in problems]
    grades = grade_all(task, problems, answers, config.grading_seconds)
    missing = len(problems) * config.generation.samples - len(answers)
    if not missing:
        folder.write_grades(grades)
    return score(task, list(problems.values()), answers, grades).replace(
        task=config.folder_name,
        kind=config.task.kind,
        problems=len(problems),
        samples=config.generation.samples,
        missing=missing,
    )


def grade_again(path: Path, grading_seconds: float) -> dict[str, Any]:
    """`cera-eval grade=DIR`: grades the recorded answers again, without a model."""
    if not path.is_dir():
        raise UserError(f"grade={path} does not exist: expected the folder of an evaluation, outputs/RUN/eval/TASK.")
    with EvaluationFolder(path) as folder:
        config = replace(folder.config(), grading_seconds=grading_seconds)
        task = task_of(config.task)
        if not isinstance(task, AnswerTask):
            raise UserError(f"grade={path} measured perplexity: there are no answers to grade.")
        answers, broken = folder.answers()
        if not answers:
            raise UserError(f"grade={path} has no answers yet: run the evaluation first, with run= and task=.")
        for line in broken:
            print_line("note", f"{line} and left out; the evaluation's command answers it again.")
        before, graded = folder.result() or AccuracyResult(), grade(task, config, folder)
        result = graded.replace(tokens_per_s=before.tokens_per_s, peak_memory_bytes=before.peak_memory_bytes)
        if result.missing:
            print_line("note", f"{result.missing} answers are missing: the scores leave them out.")
        else:
            write_result(folder, result)
        print_result(task, result, path)
        return result.to_json()


# --- perplexity ------------------------------------------------------------------------------------------------------


def measure_perplexity(evaluation: Evaluation) -> PerplexityResult:
    """Measures perplexity with the adapter and without it, and the spectra where the task has them."""
    task, subject, accelerator = evaluation.task, evaluation.subject, evaluation.accelerator
    rows = rows_of(evaluation.config, subject)
    model, base = load_subject(subject, accelerator.device)
    started = time.perf_counter()
    loss = SupervisedLoss(model, base, accelerator.autocast)
    choose_layout(subject.train.batch_layout, loss, accelerator.device)
    micro_batch_tokens = max(subject.train.micro_batch_tokens, *rows.column("length"))
    held_out = HeldOut(model, loss, rows, Team(accelerator), micro_batch_tokens, subject.train.probe_tokens)
    loss_per_token = held_out.token_losses().mean
    result = PerplexityResult(
        task=evaluation.config.folder_name,
        kind="perplexity",
        perplexity=perplexity(loss_per_token),
        loss=loss_per_token,
        rows=len(rows),
        tokens=sum(held_out.batches.supervised),
    )
    if subject.adapter is not None:
        if keeps_base(model):
            with model.disable_adapter():
                result.perplexity_base = perplexity(held_out.token_losses().mean)
        if task.has_spectra:
            result = result.replace(**spectrum_metrics(held_out.spectra()))
    seconds = time.perf_counter() - started
    return result.replace(seconds=seconds, peak_memory_bytes=peak_memory(accelerator.device))


# --- the result ------------------------------------------------------------------------------------------------------


def write_result(folder: EvaluationFolder, result: AccuracyResult | PerplexityResult) -> None:
    """Writes result.json, and the model card of a finished run's adapter, which shows its evaluations."""
    folder.write_result(result)
    run = folder.path.absolute().parent.parent
    if (run / "result.json").is_file() and (run / "adapter").is_dir():
        write_card(run, RunResult.read(run / "result.json"))


def print_result(task: Task, result: AccuracyResult | PerplexityResult, folder: Path) -> None:
    lines = accuracy_lines(task, result) if isinstance(result, AccuracyResult) else perplexity_lines(result)
    print()
    print_fields(lines | {"folder": str(folder)})


def accuracy_lines(task: AnswerTask, result: AccuracyResult) -> dict[str, str]:
    is_sampled = result.samples > 1
    lines = {"problems": f"{result.problems:,}" + f", {result.samples:,} answers each" * is_sampled}
    for accuracy in result.accuracies:
        interval = accuracy.interval
        sure = "no 95 % interval: the same for every problem"
        if interval is not None:
            sure = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
        label = accuracy.key.replace("/", " ") if is_sampled else accuracy.grader
        lines[label] = f"{accuracy.value:.1%}  ({sure})"
    lines |= task.lines(result.details)
    if shares := result.endings:
        lines["answers"] = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    lines |= {"no answer": f"{result.no_answer:,}", "grader failed": f"{result.grader_failures:,}"}
    if result.tokens_per_s:
        lines["speed"] = f"{result.tokens_per_s:,.0f} tokens/s"
    return lines


def perplexity_lines(result: PerplexityResult) -> dict[str, str]:
    lines = {"perplexity": f"{result.perplexity:.3f}"}
    if result.perplexity_base is not None:
        lines["without adapter"] = f"{result.perplexity_base:.3f}"
    if result.spectrum.effective_rank_mean is not None:
        spectrum = result.spectrum
        lines["effective rank"] = f"{spectrum.effective_rank_mean:.1f} mean, {spectrum.effective_rank_max:.1f} max"
    lines["tokens"] = f"{result.tokens:,} predicted, in {result.rows:,} rows"
    return lines | {"time": duration(result.seconds)}
