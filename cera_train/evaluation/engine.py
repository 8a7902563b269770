"""A model in this process as the engine of answers, with its adapter and in the precision that it was trained in. A
server is the other engine: both answer batches of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from cera_train.adapters.saved import attach
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.evaluation.generate import Answer, Request, cut_batches, generate, prepare_generation
from cera_train.model.folder import load_tokenizer, positions_of
from cera_train.model.precision import choose_precision
from cera_train.model.weights import fingerprint, load_model
from cera_train.runs.records import load_config
from cera_train.runs.subject import Subject
from cera_train.settings.evaluation import EvalConfig, GenerationConfig
from cera_train.settings.model import Dtype


@dataclass
class LoadedModel:
    """A model in this process."""

    model: Any
    base: PreTrainedModel
    """The transformers model in `model`; without an adapter the same."""
    tokenizer: Any
    context: Callable[[], AbstractContextManager]
    """Entered for each batch, such as autocast."""

    @property
    def positions(self) -> int | None:
        return positions_of(self.base.config)

    def batches(self, requests: Sequence[Request], max_new_tokens: int, batch_tokens: int) -> list[list[Request]]:
        return cut_batches(requests, max_new_tokens, batch_tokens)

    def answers(
        self,
        batches: Sequence[list[Request]],
        max_new_tokens: int,
        stop: list[str],
        config: GenerationConfig,
        streamer: TextStreamer | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers of each batch. A streamer gets the tokens of a single request as they come."""
        for batch in batches:
            with self.context():
                prepare_generation(self.base, self.tokenizer, max_new_tokens, stop)
                answers = generate(self.model, self.base, self.tokenizer, batch, config, streamer)
            yield answers


def choose_dtype(subject: Subject, recorded: Path | None = None) -> Subject:
    """The subject with the dtype that `model.dtype=auto` stands for: the one in the recorded config of an evaluation
    that is resumed, else the one for this hardware."""
    dtype = subject.model.dtype
    if dtype == Dtype.auto and recorded is not None and recorded.is_file():
        begun = load_config(recorded, EvalConfig)
        dtype = begun.model.dtype if begun.model else dtype
    return replace(subject, model=replace(subject.model, dtype=choose_precision(dtype).dtype))


def load_subject(subject: Subject, device: torch.device) -> LoadedModel:
    """The model of a subject whose dtype is chosen, in eval mode. Raises UserError where its adapter does not fit the
    base."""
    base = model = load_model(subject.model, device)
    if subject.adapter is not None:
        record = subject.folder / "environment.json"
        if subject.run is not None and subject.run.model.dtype == subject.model.dtype and record.is_file():
            # models of one shape load the same adapter
            expected = read_json(record).get("base_fingerprint")
            if expected not in (None, fingerprint(base)):
                raise UserError(
                    f"{subject.adapter} was trained on other weights than those of {subject.model.path}: it belongs to "
                    f"{subject.run.model.path} as it was then. Leave out model=, or name the model it was trained on."
                )
        model = attach(base, subject.adapter)
    dtype = subject.model.autocast_dtype(subject.train.autocast, on_gpu=device.type == "cuda")
    autocast = partial(torch.autocast, device.type, dtype and getattr(torch, dtype), enabled=dtype is not None)
    return LoadedModel(model.eval(), base, load_tokenizer(subject.model), autocast)
