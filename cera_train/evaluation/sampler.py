"""Answers of a model in training: by itself, or by a vLLM that has the adapter of the moment. Processes divide them."""

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
from cera_train.evaluation.engine import LoadedModel
from cera_train.evaluation.generate import Answer, Request
from cera_train.evaluation.server import Server
from cera_train.model.loss import SupervisedLoss
from cera_train.runs.folder import Progress
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.run import Config


class Sampler:
    """Answers requests, in their order, the same on every process.

    Args:
        progress: counts the updates, each of which makes another adapter.
        folder: for the adapter that a server loads.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        loss: SupervisedLoss,
        accelerator: Accelerator,
        progress: Progress,
        folder: Path,
    ) -> None:
        self.tokenizer, self.loss, self.accelerator = tokenizer, loss, accelerator
        self.progress, self.folder, self.served_update = progress, folder, None
        self.is_served = config.train.server is not None
        if self.is_served:
            require(
                is_adapter(loss.model),
                f"train.server={config.train.server}: adapter.kind={config.adapter.kind} has no adapter to load there.",
            )
            self.engine = Server(config.train.server, config.model, tokenizer)
        else:
            self.engine = LoadedModel(loss.model, loss.causal_lm, tokenizer, loss.generating)

    def close(self) -> None:
        if self.accelerator.is_main_process and self.folder.exists():
            remove_folder(self.folder)

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, stop: list[str], config: GenerationConfig
    ) -> list[Answer]:
        if self.is_served and self.served_update != self.progress.update:
            self._serve()
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        share = math.ceil(len(requests) / processes) * (longest + max_new_tokens)
        batches = self.engine.batches(requests, max_new_tokens, min(config.batch_tokens, share))[process::processes]
        answers = [
            answer for answers in self.engine.answers(batches, max_new_tokens, stop, config) for answer in answers
        ]
        by_request = {
            (answer.generation.problem, answer.generation.sample): answer for answer in gather_object(answers)
        }
        return [by_request[request.problem, request.sample] for request in requests]

    def _serve(self) -> None:
        """Gives the server the adapter of this update."""
        if self.accelerator.is_main_process:
            weights = trainable_weights(self.loss.model)
            write_folder(self.folder, lambda part: save(self.loss.model, weights, part))
            self.engine.load_adapter(self.folder)
        [self.engine.name] = broadcast_object_list([self.engine.name])
        self.served_update = self.progress.update
