"""What an adapter that is not merged costs a step of decoding.

Both models answer the same problems in one process, in turn; so a machine that slows down slows
both. Compare the ratios; the seconds are of this machine, now.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants import RANK, TARGETS
from benchmarks.rows import read_rows
from benchmarks.targets import Target, ratios
from benchmarks.training import PACKAGE
from cera_train.adapters.build import build
from cera_train.cera import for_inference
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.requests import Request
from cera_train.model.folder import load_tokenizer
from cera_train.model.language_model import LanguageModel
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import Dtype, ModelConfig

BATCHES = (1, 4, 16, 64)
MERGED = "base or merged LoRA"
SPEED = 1 / 1.08
"""Speed of decoding one row, over that of a merged LoRA, at least."""
B_STD = 0.02
"""Deviation of the drawn B, so that the branch is not zero."""


class Answering(LoadedModel):
    """A model in bfloat16, with a random CeRA or without, and problems to answer greedily."""

    def __init__(self, has_cera: bool, path: str, device: str) -> None:
        torch.manual_seed(0)
        config = ModelConfig(path=path, dtype=Dtype.bfloat16)
        base = model = load_model(config, torch.device(device))
        if has_cera:
            model = build(base, AdapterConfig(r=RANK, target_modules=TARGETS))
            for name, parameter in model.named_parameters():
                if "cera_B" in name:
                    torch.nn.init.normal_(parameter, std=B_STD)
        language_model = LanguageModel(model, base, Dtype.bfloat16).eval()
        super().__init__(language_model, load_tokenizer(config))

    def request(self, file: Path) -> Request:
        """The first problem of a file."""
        prompt = read_rows(file)[0]["prompt"]
        return Request("0", 0, tuple(self.tokenizer(prompt, add_special_tokens=False).input_ids))


def step_seconds(adapter: Answering, requests: Sequence[Request], tokens: int = 24) -> float:
    """Seconds of a step of `cera-eval` that adds a token to every answer, the prompts left out."""

    def seconds(max_new_tokens: int) -> float:
        adapter.prepare(max_new_tokens, [])
        adapter.base.generation_config.eos_token_id = [-1]  # nobody ends
        started = time.perf_counter()
        with adapter.language_model.generating():
            list(adapter.generate(requests, GenerationConfig()))
        return time.perf_counter() - started

    with for_inference(adapter.model):
        return (seconds(tokens + 1) - seconds(1)) / tokens


def decoding(
    file: Path, rounds: int, path: str = PACKAGE, device: str = "cpu"
) -> dict[str, dict[int, list[float]]]:
    """Measures what an adapter costs that is not merged: steps of CeRA beside those of the base,
    which are those of a merged LoRA, by the number of rows, in turn.

    Returns:
        Adapter -> rows -> the seconds of a step in every round.
    """
    quiet_libraries()
    contestants = {
        MERGED: Answering(False, path, device),
        "CeRA": Answering(True, path, device),
    }
    steps = {name: {rows: [] for rows in BATCHES} for name in contestants}
    for number in range(rounds + 1):
        for rows, (name, contestant) in itertools.product(BATCHES, contestants.items()):
            taken = step_seconds(contestant, [contestant.request(file)] * rows)
            if number:  # the first is a warm-up
                steps[name][rows].append(taken)
        print(f"decoding, round {number} of {rounds}", file=sys.stderr, flush=True)
    return steps


def measure_decoding(file: Path, rounds: int) -> list[Target]:
    steps = decoding(file, rounds)
    rows = BATCHES[0]
    speeds = ratios(steps[MERGED][rows], steps["CeRA"][rows])
    return [Target(f"decoding {rows} row, CeRA / merged LoRA", speeds, SPEED)]
