"""Engines that answer requests: the model of a subject, with its adapter and in the precision of
its training; while a run trains, its own model or a server."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from cera_train.adapters.saved import attach, is_adapter, save
from cera_train.common.errors import UserError, explain
from cera_train.common.files import remove_folder, write_folder
from cera_train.common.settings import require
from cera_train.distributed.accelerator import this_device
from cera_train.distributed.sharding import trainable_weights
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.requests import Answer, Request
from cera_train.evaluation.server import Server
from cera_train.model.folder import load_tokenizer
from cera_train.model.identity import identity_of
from cera_train.model.language_model import LanguageModel
from cera_train.model.precision import choose_precision
from cera_train.model.weights import load_model
from cera_train.runs.folder import Progress, check_base
from cera_train.runs.subject import Subject, run_of
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config

Engine = LoadedModel | Server
"""What answers requests."""


def choose_dtype(subject: Subject) -> Subject:
    """The subject with the dtype that `model.dtype=auto` stands for on this hardware."""
    dtype = choose_precision(subject.model.dtype, this_device()).value
    return replace(subject, model=replace(subject.model, dtype=dtype))


def load_subject(subject: Subject, device: torch.device) -> LoadedModel:
    """The model of a subject whose dtype is chosen, in eval mode. Raises UserError where its
    adapter does not fit the base."""
    base = load_model(subject.model, device)
    model = base
    if subject.adapter is not None:
        check_same_base(subject)
        model = attach(base, subject.adapter)
    autocast = subject.model.autocast_dtype(subject.train.autocast, on_gpu=device.type == "cuda")
    language_model = LanguageModel(model, base, autocast).eval()
    return LoadedModel(language_model, load_tokenizer(subject.model))


def open_server(url: str, subject: Subject) -> Server:
    """A vLLM that answers by a subject. Raises UserError where the adapter belongs to another
    base."""
    check_same_base(subject)
    return Server(url, subject.model, load_tokenizer(subject.model), subject.adapter)


def check_same_base(subject: Subject) -> None:
    """Raises UserError where the adapter's run recorded another base."""
    run = run_of(subject.adapter) if subject.run and subject.adapter else None
    if run is not None:
        fix = (
            f"It belongs to {subject.run.model.path} as it was then: leave out model=, or restore "
            "that base, or name it by model=."
        )
        check_base(subject.adapter, run, subject.model, identity_of(subject.model), fix)


# --- answers of all processes ---------------------------------------------------------------------


def answer_share(
    engine: Engine,
    requests: Sequence[Request],
    max_new_tokens: int,
    stop: list[str],
    config: GenerationConfig,
    accelerator: Accelerator,
    keep: Callable[[list[Answer]], None],
) -> None:
    """Processes divide the requests; `keep` gets this one's answers as they end. A UserError of one
    process is raised in all."""
    processes = accelerator.num_processes
    batches = engine.batches(requests, max_new_tokens, config, processes)
    share = batches[accelerator.process_index :: processes]
    problem = None
    try:
        with closing(engine.answers(share, max_new_tokens, stop, config)) as answers:
            for ended in answers:
                keep(ended)
    except UserError as error:  # of this process alone: the others wait in the gather
        problem = str(error)
    for problem_there in gather_object([problem]):
        if problem_there is not None:
            raise UserError(problem_there)


# --- a model in training --------------------------------------------------------------------------


class Sampler:
    """Answers requests by the model in training, or by a server with its current adapter.

    Args:
        progress: its update tells when the server's adapter is out of date.
        folder: for the adapter that a server loads.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        language_model: LanguageModel,
        accelerator: Accelerator,
        progress: Progress,
        folder: Path,
    ) -> None:
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.accelerator = accelerator
        self.progress = progress
        self.folder = folder
        self.served_update = None
        self.is_served = config.train.server is not None
        if self.is_served:
            require(
                is_adapter(language_model.model),
                f"train.server={config.train.server}: adapter.kind={config.adapter.kind} has no "
                f"adapter to load there.",
            )
            self.engine = Server(config.train.server, config.model, tokenizer)
        else:
            self.engine = LoadedModel(language_model, tokenizer)

    def close(self) -> None:
        if self.accelerator.is_main_process and self.folder.exists():
            remove_folder(self.folder)

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        stop: list[str],
        config: GenerationConfig,
    ) -> list[Answer]:
        """The answers in the order of the requests, the same on every process."""
        if self.is_served and self.served_update != self.progress.update:
            self._serve()
        answers: list[Answer] = []
        answer_share(
            self.engine, requests, max_new_tokens, stop, config, self.accelerator, answers.extend
        )
        by_key = {answer.generation.key: answer for answer in gather_object(answers)}
        return [by_key[request.key] for request in requests]

    def _serve(self) -> None:
        """Gives the server the adapter of this update."""
        is_main = self.accelerator.is_main_process
        model = self.language_model.model
        weights = trainable_weights(model, keep=is_main)
        problem = None
        if is_main:
            try:
                write_folder(self.folder, lambda part: save(model, weights, part))
                self.engine.load_adapter(self.folder)
            except (UserError, OSError, SafetensorError) as error:  # the others wait below
                fix = "Check the disk; the same command resumes"
                problem = explain(error) or f"{self.folder}: cannot write it: {error}. {fix}."
        self.engine.name, problem = broadcast_object_list([self.engine.name, problem])
        if problem is not None:
            raise UserError(problem)
        self.served_update = self.progress.update
