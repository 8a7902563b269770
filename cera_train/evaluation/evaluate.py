"""Evaluation, top to bottom: what is evaluated; its answers or its perplexity; grades; the result.

It takes a run's folder and needs nothing else: the folder holds the config.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import PreTrainedModel

from cera_train.adapters.spectrum import spectrum_metrics
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.terminal import print_line
from cera_train.data.config import Layout
from cera_train.data.format import start_ids, text_of
from cera_train.data.prepare import TokenizedRows, prepare_evaluation, prepare_windows
from cera_train.distributed.accelerator import peak_memory, quiet_libraries, start_accelerator
from cera_train.distributed.processes import is_main_process
from cera_train.distributed.team import Team
from cera_train.evaluation import console
from cera_train.evaluation.config import EvalConfig
from cera_train.evaluation.generate import Request, cut_batches, generate, prepare_generation
from cera_train.evaluation.held_out import HeldOut
from cera_train.evaluation.scores import counts_in_scores, grade_exactly, score, verify
from cera_train.model.loss import SupervisedLoss, choose_layout
from cera_train.model.perplexity import perplexity
from cera_train.model.weights import check_length, fingerprint, load_model, load_tokenizer, positions_of
from cera_train.runs.card import write_card
from cera_train.runs.checkpoint import load_adapter
from cera_train.runs.evaluation_folder import EvaluationFolder, Key, append_answers
from cera_train.runs.results import RunResult
from cera_train.runs.subject import Subject, digest_of, find_subject
from cera_train.tasks.config import TaskKind
from cera_train.tasks.problems import load_problems, open_task
from cera_train.tasks.records import Generation, Problem


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measures a run on a task, or goes on where an earlier call was cut.

    Returns:
        The content of result.json: `exact/pass@1`, `verified/pass@1`, `perplexity`, ... by the kind of task.

    Raises:
        ValueError: the run, the task or its data is not usable; the message says how to mend it.
    """
    quiet_libraries()
    if config.grade is not None:
        return grade_again(Path(config.grade), config.grading_seconds)
    subject = find_subject(config)
    name = config.folder_name + (subject.part if config.name is None else "")
    digest = digest_of(subject.adapter) if subject.adapter else None
    config = replace(config, name=name, model=subject.model, adapter_digest=digest)  # as it goes on record
    is_main = is_main_process()
    # A process may be done long before another: nothing is wrong with waiting for it.
    accelerator = start_accelerator(subject.model, subject.train.autocast, timeout=timedelta(days=1))
    path = subject.folder / "eval" / name
    with EvaluationFolder(path, is_main, accelerator.process_index) as folder:
        measure = measure_perplexity if config.task.kind in (TaskKind.perplexity, TaskKind.text) else answer_and_grade
        if is_main:
            folder.write_config(config)
            print_line("evaluate", f"{subject.name}, {subject.model.path}, on {config.task.name}")
        accelerator.wait_for_everyone()
        result = folder.result() if folder.is_finished() else None
        if result is None:
            result = measure(config, subject, folder, accelerator)
            if is_main:
                folder.write_result(result)
                update_card(path)
        if is_main:
            console.say_evaluation(result, path)
        return result


# --- the model -------------------------------------------------------------------------------------------------------


def load_subject(subject: Subject, device: torch.device) -> tuple[Any, PreTrainedModel]:
    """The model with its adapter, and the transformers model inside; the same model twice for an untouched one.

    Raises:
        ValueError: the adapter is damaged, or belongs to another base model.
    """
    base = load_model(subject.model, device)
    if subject.adapter is None:
        return base.eval(), base
    _check_base(subject, base)
    try:
        config = peft.PeftConfig.from_pretrained(str(subject.adapter))
        weights = peft.load_peft_weights(str(subject.adapter), device="cpu")
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{subject.adapter} is damaged or no adapter: {error}") from error
    own_base = config.base_model_name_or_path
    config.base_model_name_or_path = base.name_or_path  # PEFT warns of any other
    try:
        model = peft.get_peft_model(base, config)
        load_adapter(model, weights)
    except ValueError as error:
        raise UserError(
            f"{subject.adapter} does not fit {subject.model.path}: it belongs to another base model, "
            f"{own_base}. Leave out model=, or name that one. ({str(error)[:120]}...)"
        ) from error
    return model.eval(), base


def _check_base(subject: Subject, base: PreTrainedModel) -> None:
    """Two models of one shape take the same adapter without complaint; what the run wrote down tells them apart."""
    record = subject.folder / "environment.json"
    if subject.run is None or subject.run.model.dtype != subject.model.dtype or not record.is_file():
        return
    expected = read_json(record).get("base_fingerprint")
    if expected is not None and expected != fingerprint(base):
        raise UserError(
            f"{subject.adapter} was trained on other weights than those of {subject.model.path}: it belongs to "
            f"{subject.run.model.path} as it was then. Leave out model=, or name the model it was trained on."
        )


# --- answers and grades ----------------------------------------------------------------------------------------------


def answer_and_grade(
    config: EvalConfig, subject: Subject, folder: EvaluationFolder, accelerator: Accelerator
) -> dict[str, Any]:
    """Generates what is missing, then grades everything."""
    problems = load_problems(config.task, subject.run.data if subject.run else None)
    if accelerator.is_main_process:
        folder.write_problems(problems)
    answers, broken = folder.answers()
    for line in broken if accelerator.is_main_process else []:
        print_line("note", f"{line}: its problem is answered again.")
    accelerator.wait_for_everyone()  # nobody writes while others read
    keys = [(problem.id, sample) for problem in problems for sample in range(config.generation.samples)]
    speed = {}
    if any(key not in answers for key in keys):
        seconds, tokens = 0.0, 0
        with folder.append_to_answers() as file:
            try:
                for batch, took in generate_missing(config, subject, problems, answers.keys(), accelerator):
                    append_answers(file, batch)
                    tokens += sum(answer.tokens for answer in batch)
                    seconds += took
            except (KeyboardInterrupt, SystemExit):
                print_line("stopped", "every whole batch of answers is kept. The same command goes on.")
                raise
        own_speed = torch.tensor(tokens / seconds if seconds else 0.0, device=accelerator.device)
        speed = {"tokens_per_s": accelerator.reduce(own_speed, reduction="sum").item()}
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    answers, _ = folder.answers()
    folder.finish_answers(answers[key] for key in keys)
    return grade(config, folder) | speed | {"peak_memory_bytes": peak_memory(accelerator.device)}


def generate_missing(
    config: EvalConfig,
    subject: Subject,
    problems: Sequence[Problem],
    done: Container[Key],
    accelerator: Accelerator,
) -> Iterator[tuple[list[Generation], float]]:
    """This process's share of the answers that are not done, batch by batch, and the seconds each batch took.

    A batch of which one answer is missing is generated whole, since the rounding of an answer follows from its batch.
    """
    tokenizer = load_tokenizer(subject.model)
    model, base = load_subject(subject, accelerator.device)
    prepare_generation(base, tokenizer, config.task.max_new_tokens, config.task.stop)
    start = start_ids(tokenizer)
    prompt_ids = tokenizer([problem.prompt for problem in problems], add_special_tokens=False).input_ids
    requests = [
        Request(problem.id, sample, (*start, *ids))
        for problem, ids in zip(problems, prompt_ids, strict=True)
        for sample in range(config.generation.samples)
    ]
    _check_positions(base, requests, config.task.max_new_tokens)
    batches = cut_batches(requests, config.task.max_new_tokens, config.generation.batch_tokens)
    unfinished = [batch for batch in batches if any((request.problem, request.sample) not in done for request in batch)]
    mine = unfinished[accelerator.process_index :: accelerator.num_processes]

    by_id = {problem.id: problem for problem in problems}
    progress = console.EvaluationProgress(
        sum(map(len, mine)), visible=accelerator.is_main_process, processes=accelerator.num_processes
    )
    with contextlib.closing(progress):
        for batch in mine:
            started = time.perf_counter()
            with accelerator.autocast():
                answers = generate(model, base, tokenizer, batch, config.generation)
            correct = [grade_exactly(config.task.kind, by_id[answer.problem], answer).exact for answer in answers]
            progress.step(correct)
            missing = [answer for answer in answers if (answer.problem, answer.sample) not in done]
            yield missing, time.perf_counter() - started


def _check_positions(base: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int) -> None:
    positions = positions_of(base.config)
    longest = max(len(request.prompt_ids) for request in requests)
    if positions is not None and longest + max_new_tokens > positions:
        raise UserError(
            f"the longest prompt has {longest} tokens, and with task.max_new_tokens={max_new_tokens} it is beyond the "
            f"{positions} positions of this model: lower task.max_new_tokens, or shorten task.prompt."
        )


def grade(config: EvalConfig, folder: EvaluationFolder) -> dict[str, Any]:
    """Grades the answers on record and returns the scores; writes grades.jsonl where no answer is missing."""
    problems = {problem.id: problem for problem in folder.problems()}
    answers, _ = folder.answers()
    answers = [answer for answer in answers.values() if answer.problem in problems]
    grades = [grade_exactly(config.task.kind, problems[answer.problem], answer) for answer in answers]
    if config.task.kind != TaskKind.logistic_map:
        grades = verify(problems, answers, grades, config.grading_seconds)
    missing = len(problems) * config.generation.samples - len(answers)
    if not missing:
        folder.write_grades(grade.line() for grade in grades)
    return {
        "task": config.folder_name,
        "kind": config.task.kind.value,
        "problems": sum(counts_in_scores(problem) for problem in problems.values()),
        "samples": config.generation.samples,
        "missing": missing,
        **score(config.task.kind, list(problems.values()), answers, grades),
    }


def grade_again(path: Path, grading_seconds: float) -> dict[str, Any]:
    """`cera-eval grade=DIR`: new grades for the answers on record, without a model.

    Raises:
        ValueError: the folder holds no answers.
    """
    if not path.is_dir():
        raise UserError(f"grade={path} does not exist: expected the folder of an evaluation, outputs/RUN/eval/TASK.")
    with EvaluationFolder(path) as folder:
        config = replace(folder.config(), grading_seconds=grading_seconds)
        if config.task.kind in (TaskKind.perplexity, TaskKind.text):
            raise UserError(f"{path} measured perplexity: there are no answers to grade.")
        answers, broken = folder.answers()
        if not answers:
            raise UserError(f"{path} has no answers yet: run the evaluation first, with run= and task=.")
        for line in broken:
            print_line("note", f"{line} and left out; the evaluation's own command answers it again.")
        before = folder.result() or {}
        measured = {name: before[name] for name in ("tokens_per_s", "peak_memory_bytes") if name in before}
        result = grade(config, folder) | measured
        if result["missing"]:
            print_line("note", f"{result['missing']} answers are missing: the scores are of the others.")
        else:
            folder.write_result(result)
            update_card(path)
        console.say_evaluation(result, path)
        return result


def update_card(evaluation: Path) -> None:
    """Where an evaluation is of a finished run, the card of its adapter tells of it too."""
    run = evaluation.absolute().parent.parent
    if (run / "result.json").is_file() and (run / "adapter").is_dir():
        write_card(run, RunResult.read(run / "result.json"))


# --- perplexity ------------------------------------------------------------------------------------------------------


def measure_perplexity(
    config: EvalConfig, subject: Subject, folder: EvaluationFolder, accelerator: Accelerator
) -> dict[str, Any]:
    """Perplexity with the adapter and without it; on rows as in training, its spectra too."""
    tokenizer = load_tokenizer(subject.model)
    rows = perplexity_rows(config, subject, tokenizer)
    model, base = load_subject(subject, accelerator.device)
    started = time.perf_counter()
    loss = SupervisedLoss(model, base, accelerator.autocast)
    choose_layout(subject.train.batch_layout, loss, accelerator.device)
    micro_batch_tokens = max(subject.train.micro_batch_tokens, *rows.column("length"))
    held_out = HeldOut(model, loss, rows, Team(accelerator), micro_batch_tokens, subject.train.probe_tokens)
    loss_per_token = held_out.mean_loss()
    result = {
        "task": config.folder_name,
        "kind": "perplexity",
        "perplexity": perplexity(loss_per_token),
        "loss": loss_per_token,
        "rows": len(rows.rows),
        "tokens": sum(held_out.batches.supervised),
    }
    if subject.adapter is not None:
        with model.disable_adapter():
            result["perplexity_base"] = perplexity(held_out.mean_loss())
        if config.task.kind == TaskKind.perplexity:
            metrics = spectrum_metrics(held_out.spectra())
            result |= {name: value for name, value in metrics.items() if name.endswith(("/mean", "/max"))}
    return result | {
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(accelerator.device),
    }


def perplexity_rows(config: EvalConfig, subject: Subject, tokenizer: Any) -> TokenizedRows:
    """The rows to predict.

    Raises:
        ValueError: there are none, or they lack the columns that the layout needs.
    """
    task = config.task
    if task.kind == TaskKind.text:
        check_length(subject.model, task.window, "task.window")
        text = "\n\n".join(text_of(row, "text") for row in open_task(task).read())
        return prepare_windows(text, tokenizer, task.window, task.limit)
    data = config.data or (subject.run.data if subject.run else None)
    if data is None:
        raise UserError(f"{subject.folder} does not say what it was trained on: choose the rows with data=....")
    if task.files and data.layout == Layout.logistic_map:
        raise UserError("task.files: this run's rows are computed, not read. Say how these files read: data=jsonl.")
    if task.files:
        data = replace(data, train_files=task.files, eval_files=task.files, eval_rows=None)
    return prepare_evaluation(data, tokenizer, task.limit)
