"""Evaluation, top to bottom: load the model; generate answers and grade them, or measure
perplexity; write and print the result. A run's folder is all it needs: the folder holds the
config."""

import time
from collections.abc import Container, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cera_train.adapters.saved import keeps_base
from cera_train.adapters.spectrum import spectrum_metrics
from cera_train.common.settings import require
from cera_train.common.terminal import ProgressBar, duration, print_fields, print_line
from cera_train.distributed.accelerator import (
    forget_earlier_runs,
    quiet_libraries,
    start_accelerator,
)
from cera_train.evaluation.engine import choose_dtype, load_subject
from cera_train.evaluation.generate import CACHE_BYTES
from cera_train.evaluation.grading import grade_all, score
from cera_train.evaluation.held_out import HeldOut
from cera_train.evaluation.requests import requests_for
from cera_train.evaluation.server import Server
from cera_train.evaluation.tasks.task import (
    AnswerTask,
    Task,
    build_task,
    describe_trained_on,
    load_problems,
)
from cera_train.model.folder import load_tokenizer
from cera_train.model.loss import SupervisedLoss, choose_layout, perplexity
from cera_train.runs.evaluation_folder import (
    AccuracyResult,
    EvaluationFolder,
    Key,
    PerplexityResult,
    Problem,
    find_evaluation_result,
)
from cera_train.runs.results import describe_rank
from cera_train.runs.subject import Subject, digest_of, find_subject
from cera_train.settings.distributed import DistributedConfig
from cera_train.settings.evaluation import EvalConfig


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measures a run on a task, or resumes where an earlier call was cut. Answers that are there
    are graded again.

    Returns:
        The content of result.json, such as `exact/pass@1` or `perplexity`, by the kind of task.

    Raises:
        UserError: the run, the task or its data cannot be used.
    """
    quiet_libraries()
    forget_earlier_runs()
    subject = find_subject(config)
    name = config.folder_name + (subject.part if config.name is None else "")
    path = subject.folder / "eval" / name
    if config.server is None:  # else the server chooses
        subject = choose_dtype(subject, path / "config.yaml")
    # Answers differ in length, so one process may wait hours for another.
    accelerator = start_accelerator(
        subject.model, subject.train.autocast, DistributedConfig(timeout=86_400)
    )
    is_main = accelerator.is_main_process
    server = None
    computes = str(subject.model.dtype)
    with EvaluationFolder.open(path, is_main, accelerator.process_index) as folder:
        if config.server is not None:
            server = Server(
                config.server, subject.model, load_tokenizer(subject.model), subject.adapter
            )
            computes = f"{server.version} at {server.url}"
        config = replace(
            config,
            name=name,
            model=subject.model,
            adapter_digest=digest_of(subject.adapter) if subject.adapter else None,
            engine=server and server.version,
        )
        task = build_task(config.task)
        if is_main:
            folder.write_config(config)
            print_line("evaluate", f"{subject}, on {config.task.name}, {computes}")
        accelerator.wait_for_everyone()
        evaluation = Evaluation(task, config, subject, folder, accelerator, server)
        if isinstance(task, AnswerTask):
            result = evaluation.answer_and_grade()
            lines = accuracy_lines(task, result) if is_main else {}
        else:
            result = evaluation.measure_perplexity()
            lines = perplexity_lines(result)
        if is_main:
            result.write(path / "result.json")
            print()
            print_fields(lines | {"folder": str(path)})
        return result.to_json()


@dataclass(frozen=True)
class Evaluation:
    """One evaluation in progress; without a server, the model in this process answers."""

    task: Task
    config: EvalConfig
    subject: Subject
    folder: EvaluationFolder
    accelerator: Accelerator
    server: Server | None

    def answer_and_grade(self) -> AccuracyResult:
        """Generates the missing answers, then grades all of them; the main process alone has the
        result."""
        task = self.task
        config = self.config
        folder = self.folder
        accelerator = self.accelerator
        is_main = accelerator.is_main_process
        problems = load_problems(config.task, self.subject.data)
        if is_main:
            folder.write_problems(problems)
            if self.subject.data and (shared := describe_trained_on(problems, self.subject.data)):
                print_line("shared", shared)
        answers = folder.answers()
        accelerator.wait_for_everyone()  # nobody writes while others read
        keys = [
            (problem.id, sample)
            for problem in problems
            for sample in range(config.generation.samples)
        ]
        if any(key not in answers for key in keys):
            try:
                self.generate_missing(problems, answers.keys())
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
        grades = grade_all(task, problems, answers)
        folder.write_grades(grades)
        return score(task, problems, answers, grades).replace(
            task=config.folder_name,
            kind=config.task.kind,
            problems=len(problems),
            samples=config.generation.samples,
        )

    def generate_missing(self, problems: Sequence[Problem], done: Container[Key]) -> None:
        """Appends this process's share of the missing answers to its file, as they come."""
        accelerator = self.accelerator
        settings = self.config.task
        generation = self.config.generation
        engine = self.server or load_subject(self.subject, accelerator.device)
        room = settings.max_new_tokens
        requests = [
            request
            for request in requests_for(
                problems, generation.samples, engine.tokenizer, room, engine.positions
            )
            if (request.problem, request.sample) not in done
        ]
        processes = accelerator.num_processes
        if self.server is None:  # rounding follows from the batch: every process cuts the same ones
            tokens = generation.batch_tokens or engine.batch_tokens(
                requests, room, processes, self.cache_memory()
            )
            generation = replace(generation, batch_tokens=min(gather_object([tokens])))
        mine = engine.batches(requests, room, generation, processes)[
            accelerator.process_index :: processes
        ]
        by_id = {problem.id: problem for problem in problems}
        total = sum(map(len, mine))
        answered = 0
        correct = 0
        started = time.perf_counter()
        others = processes - 1
        sharing = f" in this process, {others} more at work" if others else ""
        with (
            closing(
                ProgressBar("answer", total, 0, visible=accelerator.is_main_process)
            ) as progress,
            closing(engine.answers(mine, room, settings.stop, generation)) as batches,
        ):
            for ended in batches:
                answers = [answer.generation for answer in ended]
                self.folder.append_answers(answers)
                answered += len(answers)
                correct += sum(
                    self.task.grade(by_id[answer.problem], answer).exact for answer in answers
                )
                left = duration((time.perf_counter() - started) / answered * (total - answered))
                progress.step(f"exact {correct / answered:.1%}{sharing}  {left} left", len(answers))

    def cache_memory(self) -> int:
        """Bytes for the keys and values of a batch."""
        device = self.accelerator.device
        return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CACHE_BYTES

    def measure_perplexity(self) -> PerplexityResult:
        """Measures perplexity with the adapter and without it, and on rows the spectra; once, then
        it is on record."""
        config = self.config
        subject = self.subject
        accelerator = self.accelerator
        rows = self.task.rows(
            config.task, config.data or subject.data, subject.model, load_tokenizer(subject.model)
        )
        if (before := find_evaluation_result(self.folder.path)) is not None:
            require(
                before.rows_digest == rows.digest,
                f"{self.folder.path} has the perplexity of other rows: a data file changed. "
                f"Restore it, or set "
                "name=... for another folder.",
            )
            return before
        loaded = load_subject(subject, accelerator.device)
        loss = SupervisedLoss(loaded.model, loaded.base, loaded.context)
        choose_layout(subject.train.batch_layout, loss, accelerator.device)
        micro_batch_tokens = max(subject.train.micro_batch_tokens, *rows.column("length"))
        held_out = HeldOut(loss, rows, accelerator, micro_batch_tokens, subject.train.probe_tokens)
        loss_per_token = held_out.token_losses().mean
        result = PerplexityResult(
            task=config.folder_name,
            kind="perplexity",
            perplexity=perplexity(loss_per_token),
            loss=loss_per_token,
            rows=len(rows),
            tokens=sum(held_out.batches.supervised),
            rows_digest=rows.digest,
        )
        if subject.adapter is not None:
            if keeps_base(loaded.model):
                with loaded.model.disable_adapter():
                    result.perplexity_base = perplexity(held_out.token_losses().mean)
            if config.task.window is None:
                result = result.replace(**spectrum_metrics(held_out.spectra()))
        return result


def accuracy_lines(task: AnswerTask, result: AccuracyResult) -> dict[str, str]:
    """Labels and texts to print."""
    is_sampled = result.samples > 1
    lines = {"problems": f"{result.problems:,}" + f", {result.samples:,} answers each" * is_sampled}
    for key, interval in result.accuracies.items():
        label = key.replace("/", " ") if is_sampled else key.removesuffix("/pass@1")
        lines[label] = f"{result.details[key]:.1%}"
        if interval is not None:
            lines[label] += "  (95 % interval {:.1%} to {:.1%})".format(*interval)
    lines |= task.lines(result.details)
    lines["answers"] = ", ".join(f"{name} {share:.1%}" for name, share in result.endings.items())
    lines |= {"no answer": f"{result.no_answer:,}", "grader failed": f"{result.grader_failures:,}"}
    return lines


def perplexity_lines(result: PerplexityResult) -> dict[str, str]:
    """Labels and texts to print."""
    lines = {"perplexity": f"{result.perplexity:.3f}"}
    if result.perplexity_base is not None:
        lines["without adapter"] = f"{result.perplexity_base:.3f}"
    if rank := describe_rank(result.spectrum):
        lines["effective rank"] = rank
    lines["tokens"] = f"{result.tokens:,} predicted, in {result.rows:,} rows"
    return lines
