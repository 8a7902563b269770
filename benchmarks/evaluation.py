"""How fast problems are answered, beside transformers' `generate` on problems sorted by length, in
its best batch size.

All ways answer the same problems with the same CeRA adapter in one process, in turn; so a machine
that slows down slows all. Compare the ratios; the seconds are of this machine, now.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
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
from cera_train.evaluation.requests import Request, answer_of
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import Dtype, ModelConfig

LIBRARY_BATCHES = (16, 32, 64)
SPEEDUP = 1.25
"""Our loop's answers a second, over those of `generate`: a smaller gain is not worth the code."""
BATCHES = (1, 4, 16, 64)
MERGED = "base or merged LoRA"
OVERHEAD = 1.08
"""Time of a decoding step of one row, over that of a merged LoRA, at most."""
B_STD = 0.02
"""Deviation of the drawn B, so that the branch is not zero."""


class Answering(LoadedModel):
    """A model in bfloat16 with an adapter, and problems to answer greedily."""

    def __init__(self, kind: AdapterKind | None, path: str = PACKAGE, device: str = "cpu") -> None:
        torch.manual_seed(0)
        config = ModelConfig(path=path, dtype=Dtype.bfloat16)
        base = model = load_model(config, torch.device(device)).eval()
        if kind is not None:
            model = build(base, AdapterConfig(kind, RANK, target_modules=TARGETS)).eval()
            for name, parameter in model.named_parameters():
                if "cera_B" in name or "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=B_STD)
        super().__init__(
            model, base, load_tokenizer(config), partial(torch.autocast, device, torch.bfloat16)
        )

    def requests(self, file: Path, problems: int) -> list[Request]:
        texts = [row["prompt"] for row in read_rows(file)[:problems]]
        prompts = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [Request(str(number), 0, tuple(ids)) for number, ids in enumerate(prompts)]

    def ours(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        """Answers as cera-eval does."""
        config = GenerationConfig()
        batches = self.batches(requests, max_new_tokens, config, 1)
        list(self.answers(batches, max_new_tokens, [], config))

    def library(self, requests: Sequence[Request], max_new_tokens: int, rows: int) -> None:
        """Answers by `generate` in batches of similar length, padded on the left, each as long as
        its longest answer."""
        self.prepare(max_new_tokens, [])
        longest_first = sorted(requests, key=lambda request: -len(request.prompt_ids))
        for start in range(0, len(requests), rows):
            batch = longest_first[start : start + rows]
            columns = {"input_ids": [list(request.prompt_ids) for request in batch]}
            inputs = self.tokenizer.pad(columns, padding_side="left", return_tensors="pt")
            with self.context():
                output = self.model.generate(**inputs)[:, inputs.input_ids.shape[1] :].tolist()
            for request, ids in zip(batch, output, strict=True):
                answer_of(request, ids, self.tokenizer, self.base.generation_config)


def measure(file: Path, rounds: int) -> list[Target]:
    """Ours beside the library's best, on 64 problems of at most 96 new tokens."""
    quiet_libraries()
    answering = Answering(AdapterKind.cera)
    requests = answering.requests(file, 64)
    ways = {f"generate, {rows}": partial(answering.library, rows=rows) for rows in LIBRARY_BATCHES}
    ways["ours"] = answering.ours
    for way in ways.values():
        way(requests[:4], 8)  # a warm-up
    seconds = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way(requests, 96)
            seconds[name].append(time.perf_counter() - started)
        taken = ", ".join(f"{name} {seconds[name][-1]:.1f} s" for name in ways)
        print(f"round {number + 1} of {rounds}: {taken}", file=sys.stderr, flush=True)
    best = min([*ways][:-1], key=lambda name: statistics.median(seconds[name]))
    speedups = ratios(seconds[best], seconds["ours"])
    return [Target(f"evaluation, {best} at once / ours", speedups, SPEEDUP)]


def step_seconds(adapter: Answering, requests: Sequence[Request], tokens: int = 24) -> float:
    """Seconds of a step of `cera-eval` that adds a token to every answer, the prompts left out."""

    def seconds(max_new_tokens: int) -> float:
        adapter.prepare(max_new_tokens, [])
        adapter.base.generation_config.eos_token_id = [-1]  # nobody ends
        started = time.perf_counter()
        with adapter.context():
            list(adapter.generate(requests, GenerationConfig()))
        return time.perf_counter() - started

    with for_inference(adapter.model):
        return (seconds(tokens + 1) - seconds(1)) / tokens


def decoding(
    file: Path,
    rounds: int,
    path: str = PACKAGE,
    device: str = "cpu",
) -> dict[str, dict[int, list[float]]]:
    """What an adapter costs that is not merged: steps of CeRA beside those of the base, which are
    those of a merged LoRA, by the number of rows, in turn.

    Returns:
        Adapter -> rows -> the seconds of a step in every round.
    """
    quiet_libraries()
    contestants = {
        MERGED: Answering(None, path, device),
        "CeRA": Answering(AdapterKind.cera, path, device),
    }
    steps = {name: {rows: [] for rows in BATCHES} for name in contestants}
    for number in range(rounds + 1):
        for rows, (name, contestant) in itertools.product(BATCHES, contestants.items()):
            taken = step_seconds(contestant, contestant.requests(file, 1) * rows)
            if number:  # the first is a warm-up
                steps[name][rows].append(taken)
        print(f"decoding, round {number} of {rounds}", file=sys.stderr, flush=True)
    print(
        f"\n{'new tokens/s by rows in the batch':<34}" + "".join(f"{rows:>8}" for rows in BATCHES)
    )
    for name, taken in steps.items():
        print(
            f"{name:<34}"
            + "".join(f"{rows / statistics.median(taken[rows]):>8.0f}" for rows in BATCHES)
        )
    return steps


def measure_decoding(file: Path, rounds: int) -> list[Target]:
    steps = decoding(file, rounds)
    costs = ratios(steps["CeRA"][BATCHES[0]], steps[MERGED][BATCHES[0]])
    name = f"decoding {BATCHES[0]} row, CeRA / merged LoRA"
    return [Target(name, costs, OVERHEAD, is_least=False)]
