"""Evaluation, top to bottom: load the model; generate answers and grade them, or measure perplexity; write and print
the result. A run's folder is all it needs: the folder holds the config."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterator, Sequence
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
from cera_train.distributed.accelerator import quiet_libraries, start_accelerator
from cera_train.evaluation.generate import (
    Request,
    cut_batches,
    generate,
    generation_settings,
    prepare_generation,
    requests_for,
)
from cera_train.evaluation.grading import grade_all, score
from cera_train.evaluation.held_out import HeldOut
from cera_train.evaluation.server import Server
from cera_train.evaluation.tasks.task import AnswerTask, Task, build_task, describe_trained_on, load_problems
from cera_train.model.folder import load_tokenizer, model_ends, positions_of
from cera_train.model.loss import SupervisedLoss, choose_layout, perplexity
from cera_train.model.precision import choose_precision
from cera_train.model.weights import fingerprint, load_model
from cera_train.runs.evaluation_folder import (
    AccuracyResult,
    EvaluationFolder,
    Generation,
    Key,
    PerplexityResult,
    Problem,
    append_answers,
)
from cera_train.runs.records import load_config
from cera_train.runs.results import describe_rank
from cera_train.runs.subject import Subject, digest_of, find_subject
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.model import Dtype


@dataclass(frozen=True)
class Evaluation:
    """A task, its settings, the model, the folder of the results, the processes, and the server that answers, if one
    does."""

    task: Task
    config: EvalConfig
    subject: Subject
    folder: EvaluationFolder
    accelerator: Accelerator
    server: Server | None


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measures a run on a task, or resumes where an earlier call was cut. Answers that are there are graded again.

    Returns:
        The content of result.json, such as `exact/pass@1` or `perplexity`, by the kind of task.

    Raises:
        UserError: the run, the task or its data cannot be used.
    """
    quiet_libraries()
    subject = find_subject(config)
    name = config.folder_name + (subject.part if config.name is None else "")
    path = subject.folder / "eval" / name
    if config.server is None:  # else the server chooses
        subject = choose_dtype(subject, path / "config.yaml")
    digest = digest_of(subject.adapter) if subject.adapter else None
    config = replace(config, name=name, model=subject.model, adapter_digest=digest)
    # Answers differ in length, so one process may wait hours for another.
    accelerator = start_accelerator(subject.model, subject.train.autocast, timeout=timedelta(days=1))
    is_main = accelerator.is_main_process
    engine = Server(config.server, subject.model, subject.adapter) if config.server else contextlib.nullcontext()
    with engine as server, EvaluationFolder.open(path, is_main, accelerator.process_index) as folder:
        config = replace(config, engine=server and server.engine)
        task = build_task(config.task)
        if is_main:
            folder.write_config(config)
            computes = f"{server.engine} at {server.url}" if server else subject.model.dtype
            print_line("evaluate", f"{subject}, on {config.task.name}, {computes}")
        accelerator.wait_for_everyone()
        evaluation = Evaluation(task, config, subject, folder, accelerator, server)
        if isinstance(task, AnswerTask):
            result = answer_and_grade(evaluation)
            lines = accuracy_lines(task, result) if is_main else {}
        else:
            result = measure_perplexity(evaluation)
            lines = perplexity_lines(result)
        if is_main:
            result.write(path / "result.json")
            print()
            print_fields(lines | {"folder": str(path)})
        return result.to_json()


def choose_dtype(subject: Subject, recorded: Path | None = None) -> Subject:
    """The subject with the dtype that `model.dtype=auto` stands for: the one in the recorded config of an evaluation
    that is resumed, else the one for this hardware."""
    dtype = subject.model.dtype
    if dtype == Dtype.auto and recorded is not None and recorded.is_file():
        begun = load_config(recorded, EvalConfig)
        dtype = begun.model.dtype if begun.model else dtype
    return replace(subject, model=replace(subject.model, dtype=choose_precision(dtype).dtype))


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
    task, config, folder, accelerator = evaluation.task, evaluation.config, evaluation.folder, evaluation.accelerator
    is_main = accelerator.is_main_process
    problems = load_problems(config.task, evaluation.subject.data)
    if is_main:
        folder.write_problems(problems)
        print_shared(problems, evaluation.subject.data)
    answers = folder.answers()
    accelerator.wait_for_everyone()  # nobody writes while others read
    keys = [(problem.id, sample) for problem in problems for sample in range(config.generation.samples)]
    if any(key not in answers for key in keys):
        with folder.append_to_answers() as file:
            try:
                generate_missing(evaluation, problems, answers.keys(), file)
            except (KeyboardInterrupt, SystemExit):
                if is_main:
                    print_line("stopped", "the answers so far are kept. The same command resumes.")
                raise
    accelerator.wait_for_everyone()
    if not is_main:
        return AccuracyResult()

    recorded = folder.answers()
    answers = [recorded[key] for key in keys]
    folder.finish_answers(answers)
    grades = grade_all(task, problems, answers, config.grading_seconds)
    folder.write_grades(grades)
    return score(task, problems, answers, grades).replace(
        task=config.folder_name,
        kind=config.task.kind,
        problems=len(problems),
        samples=config.generation.samples,
    )


def print_shared(problems: Sequence[Problem], trained_on: DataConfig | None) -> None:
    """Prints how many problems are among the rows that the run was trained on, where these can still be read."""
    try:
        shared = describe_trained_on(problems, trained_on) if trained_on else ""
    except UserError as error:
        shared = f"unknown, since the training rows cannot be read: {error}"
    if shared:
        print_line("shared", shared)


def generate_missing(evaluation: Evaluation, problems: Sequence[Problem], done: Container[Key], file: TextIO) -> None:
    """Appends this process's share of the missing answers to a file, as they come."""
    accelerator, task = evaluation.accelerator, evaluation.task
    ask = ask_model if evaluation.server is None else ask_server
    total, batches = ask(evaluation, problems, done)
    by_id = {problem.id: problem for problem in problems}
    answered, correct, started = 0, 0, time.perf_counter()
    others = accelerator.num_processes - 1
    sharing = f" in this process, {others} more at work" if others else ""
    with contextlib.closing(ProgressBar("answer", total, 0, visible=accelerator.is_main_process)) as progress:
        for answers in batches:
            append_answers(file, [answer for answer in answers if (answer.problem, answer.sample) not in done])
            answered += len(answers)
            correct += sum(task.grade(by_id[answer.problem], answer).exact for answer in answers)
            left = duration((time.perf_counter() - started) / answered * (total - answered))
            progress.step(f"exact {correct / answered:.1%}{sharing}  {left} left", len(answers))


Batches = tuple[int, Iterator[list[Generation]]]
"""How many answers this process gets, and these, batch by batch."""


def ask_model(evaluation: Evaluation, problems: Sequence[Problem], done: Container[Key]) -> Batches:
    """A batch that lacks one answer is generated whole, since the rounding of an answer depends on its batch."""
    config, accelerator = evaluation.config, evaluation.accelerator
    tokenizer = load_tokenizer(evaluation.subject.model)
    model, base = load_subject(evaluation.subject, accelerator.device)
    room = config.task.max_new_tokens
    prepare_generation(base, tokenizer, room, config.task.stop)
    requests = requests_for(problems, config.generation.samples, tokenizer, room, positions_of(base.config))
    batches = cut_batches(requests, room, config.generation.batch_tokens)
    unfinished = [batch for batch in batches if any((request.problem, request.sample) not in done for request in batch)]
    mine = unfinished[accelerator.process_index :: accelerator.num_processes]

    def answer(batch: list[Request]) -> list[Generation]:
        with accelerator.autocast():
            return generate(model, base, tokenizer, batch, config.generation)

    return sum(map(len, mine)), map(answer, mine)


def ask_server(evaluation: Evaluation, problems: Sequence[Problem], done: Container[Key]) -> Batches:
    """Answers of a server come one by one."""
    config, accelerator, server = evaluation.config, evaluation.accelerator, evaluation.server
    tokenizer = load_tokenizer(evaluation.subject.model)
    room = config.task.max_new_tokens
    settings = generation_settings(tokenizer, model_ends(evaluation.subject.model), room, config.task.stop)
    requests = requests_for(problems, config.generation.samples, tokenizer, room, server.positions)
    missing = [request for request in requests if (request.problem, request.sample) not in done]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    server.load_adapter()
    return len(mine), ([answer.generation] for answer in server.answers(mine, tokenizer, settings, config.generation))


def accuracy_lines(task: AnswerTask, result: AccuracyResult) -> dict[str, str]:
    """Labels and texts to print."""
    is_sampled = result.samples > 1
    lines = {"problems": f"{result.problems:,}" + f", {result.samples:,} answers each" * is_sampled}
    for accuracy in result.accuracies:
        label = accuracy.key.replace("/", " ") if is_sampled else accuracy.grader
        lines[label] = f"{accuracy.value:.1%}"
        if accuracy.interval is not None:
            lines[label] += "  (95 % interval {:.1%} to {:.1%})".format(*accuracy.interval)
    lines |= task.lines(result.details)
    lines["answers"] = ", ".join(f"{name} {share:.1%}" for name, share in result.endings.items())
    lines |= {"no answer": f"{result.no_answer:,}", "grader failed": f"{result.grader_failures:,}"}
    return lines


# --- perplexity ------------------------------------------------------------------------------------------------------


def measure_perplexity(evaluation: Evaluation) -> PerplexityResult:
    """Measures perplexity with the adapter and without it, and on rows the spectra; once, then it is on record."""
    config, subject, accelerator = evaluation.config, evaluation.subject, evaluation.accelerator
    if (before := evaluation.folder.result()) is not None:
        return before
    tokenizer = load_tokenizer(subject.model)
    rows = evaluation.task.rows(config.task, config.data or subject.data, subject.model, tokenizer)
    model, base = load_subject(subject, accelerator.device)
    loss = SupervisedLoss(model, base, accelerator.autocast)
    choose_layout(subject.train.batch_layout, loss, accelerator.device)
    micro_batch_tokens = max(subject.train.micro_batch_tokens, *rows.column("length"))
    held_out = HeldOut(model, loss, rows, accelerator, micro_batch_tokens, subject.train.probe_tokens)
    loss_per_token = held_out.token_losses().mean
    result = PerplexityResult(
        task=config.folder_name,
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
        if config.task.window is None:
            result = result.replace(**spectrum_metrics(held_out.spectra()))
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
