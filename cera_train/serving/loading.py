"""The model of a run's folder, in the precision that its training computed in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cera_train.distributed.accelerator import mixed_precision
from cera_train.evaluation.evaluate import load_subject, settled
from cera_train.model.weights import load_tokenizer
from cera_train.runs.subject import Subject, find_subject

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Loaded:
    """A model with its adapter, in eval mode."""

    subject: Subject
    model: Any
    base: PreTrainedModel
    tokenizer: Any
    autocast: torch.autocast

    @property
    def name(self) -> str:
        return f"{self.subject.name}, {self.subject.model.path}"


def load(config: Any, place: str) -> Loaded:
    """Loads what a folder holds, or the base model.

    Args:
        config: a `ChatConfig` or `ExportConfig`.
        place: the folder of a run or an adapter, or `base`.

    Raises:
        UserError: there is no such folder, or it does not fit its base model.
    """
    subject = settled(find_subject(replace(config, run=place)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, base = load_subject(subject, device)
    return Loaded(subject, model, base, load_tokenizer(subject.model), autocast_of(subject, device))


def autocast_of(subject: Subject, device: torch.device) -> torch.autocast:
    precision = mixed_precision(subject.model, subject.train.autocast)
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
