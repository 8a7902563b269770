"""The model of a run's folder, in the precision that its training computed in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cera_train.distributed.accelerator import this_device
from cera_train.evaluation.evaluate import choose_dtype, load_subject
from cera_train.model.folder import load_tokenizer
from cera_train.runs.subject import Subject, find_subject
from cera_train.settings.evaluation import SubjectConfig


@dataclass
class Loaded:
    """A model with its adapter, in eval mode."""

    subject: Subject
    model: Any
    base: PreTrainedModel
    tokenizer: Any
    autocast: torch.autocast


def load(config: SubjectConfig, place: str) -> Loaded:
    """Loads what a place holds: the folder of a run or an adapter, or `base`. Raises UserError where there is no such
    folder, or it does not fit its base model."""
    subject = choose_dtype(find_subject(replace(config, run=place)))
    device = this_device()
    model, base = load_subject(subject, device)
    dtype = subject.model.autocast_dtype(subject.train.autocast, on_gpu=device.type == "cuda")
    autocast = torch.autocast(device.type, dtype and getattr(torch, dtype), enabled=dtype is not None)
    return Loaded(subject, model, base, load_tokenizer(subject.model), autocast)
