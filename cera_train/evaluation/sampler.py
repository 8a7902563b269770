"""Answers of a model in training: its processes divide them, or a vLLM gives them by the adapter of the moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cera_train.adapters.saved import is_adapter, save
from cera_train.common.files import remove_folder, write_folder
from cera_train.common.settings import require
from cera_train.distributed.sharding import trainable_weights
from cera_train.evaluation.generate import (
    Answer,
    Request,
    cut_batches,
    generate_ids,
    generation_of,
    generation_settings,
    prepare_generation,
)
from cera_train.evaluation.server import Server
from cera_train.model.folder import model_ends
from cera_train.model.loss import SupervisedLoss
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config


class Sampler:
    """Answers requests, in their order, the same on every process.

    Args:
        folder: for the adapter that a server loads.
    """

    def __init__(
        self, config: Config, tokenizer: Any, loss: SupervisedLoss, accelerator: Accelerator, folder: Path
    ) -> None:
        self.model_config, self.tokenizer, self.loss, self.accelerator = config.model, tokenizer, loss, accelerator
        self.folder, self.is_served, self.server = folder, config.train.server is not None, None
        if self.is_served:
            require(
                is_adapter(loss.model),
                f"train.server={config.train.server}: adapter.kind={config.adapter.kind} has no adapter to load there.",
            )
            if accelerator.is_main_process:
                self.server = Server(config.train.server, config.model).__enter__()

    def close(self) -> None:
        if self.server is not None:
            self.server.__exit__()
        if self.server is not None and self.folder.exists():
            remove_folder(self.folder)

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, stop: list[str], config: GenerationConfig
    ) -> list[Answer]:
        of_one = self._served if self.is_served else self._generated
        answers = of_one(requests, max_new_tokens, stop, config)
        return [answers[request.problem, request.sample] for request in requests]

    def _generated(
        self, requests: Sequence[Request], max_new_tokens: int, stop: list[str], config: GenerationConfig
    ) -> dict[tuple[str, int], Answer]:
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        share = math.ceil(len(requests) / processes) * (longest + max_new_tokens)
        answers = {}
        with self.loss.generating() as base:
            prepare_generation(base, self.tokenizer, max_new_tokens, stop)
            for batch in cut_batches(requests, max_new_tokens, min(config.batch_tokens, share))[process::processes]:
                tokens = generate_ids(self.loss.model, base, self.tokenizer, batch, config)
                for request, ids in zip(batch, tokens, strict=True):
                    answer = generation_of(request, ids, self.tokenizer, base.generation_config)
                    answers[request.problem, request.sample] = Answer(answer, ids)
        return {key: answer for mine in gather_object([answers]) for key, answer in mine.items()}

    def _served(
        self, requests: Sequence[Request], max_new_tokens: int, stop: list[str], config: GenerationConfig
    ) -> dict[tuple[str, int], Answer]:
        answers = {}
        if self.server is not None:
            weights = trainable_weights(self.loss.model)
            write_folder(self.folder, lambda part: save(self.loss.model, weights, part))
            self.server.replace_adapter(self.folder)
            settings = generation_settings(self.tokenizer, model_ends(self.model_config), max_new_tokens, stop)
            for answer in self.server.answers(requests, self.tokenizer, settings, config, with_log_p=True):
                answers[answer.generation.problem, answer.generation.sample] = answer
        return broadcast_object_list([answers])[0]
