"""What a model forgets while it learns 32 conflicting formats, at a held-out loss that every method
reaches: `python -m benchmarks.forgetting --rows gsm8k/test.jsonl chats.jsonl`, `cera-train -m
+sweep=forgetting`, then `python -m benchmarks.forgetting`, also before all runs have ended.

Each method has a frontier over its rates: the held-out loss, and the rise of the loss on other text
over the base's. Methods are compared where their frontiers reach one loss, seed by seed.
docs/evidence/forgetting keeps the frontiers of every seed whose runs have ended, and those are
judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import cera_train  # noqa: F401  registers CeRA with PEFT
from benchmarks import skills
from benchmarks.rows import completion_losses, read_rows, with_holm, write_result, write_rows
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.runs.records import load_config
from cera_train.runs.results import LOSSES_AFTER, TokenLosses
from cera_train.verdicts.contrast import contrast
from cera_train.verdicts.power import detectable

FOLDER = Path("outputs/forgetting")
EVIDENCE = Path("docs/evidence/forgetting")
"""Has a file for each seed, so that its 16 runs may be those of another machine."""
RATES = {
    "lora": (0.0028, 0.004, 0.0056, 0.008),
    "lora_kaiming": (0.0014, 0.002, 0.0028, 0.004),
    "cera_identity": (0.0028, 0.004, 0.0056, 0.008),
    "cera": (0.0028, 0.004, 0.0056, 0.008),
}
"""Of each arm. At rates this far apart, lora_kaiming learns as fast as half of its scale."""
SEEDS = range(5, 17)
FORMATS = 32
ROWS = {"gsm8k": 300, "chats": 60}
"""Of each text, those with the shortest prompts."""
TOKENS = 40
"""Of a completion, at most: with short prompts, all rows cost a minute of one core."""
LOSSES = (0.10, 0.14, 0.2)
"""The first that every primary contrast finds in `REACHED` of the seeds is the primary one."""
REACHED = 0.75
PRIMARY = (("lora", "cera"), ("lora", "cera_identity"), ("cera_identity", "cera"))
OTHERS = (("lora", "lora_kaiming"), ("lora_kaiming", "cera"))

Row = tuple[str, str]
"""Prompt and completion."""


# --- rows -----------------------------------------------------------------------------------------


def texts_of(gsm8k: Path, chats: Path) -> dict[str, list[Row]]:
    """Word problems, and the first answers of chats in ShareGPT's layout."""

    def said(chat: dict[str, Any], speaker: str) -> str:
        return next(turn["value"] for turn in chat["conversations"] if turn["from"] == speaker)

    return {
        "gsm8k": [
            (f"Question: {row['question']}\nAnswer:", f" {row['answer']}")
            for row in read_rows(gsm8k)
        ],
        "chats": [
            (f"User: {said(chat, 'human')}\nAssistant:", f" {said(chat, 'gpt')}")
            for chat in read_rows(chats)
            if said(chat, "human").isascii()
        ],
    }


def write_texts(gsm8k: Path, chats: Path) -> None:
    """Writes the rows of dates that are learned, with those held out last, and other text."""
    shortest = {
        text: sorted(rows, key=lambda row: len(row[0]))[: ROWS[text]]
        for text, rows in texts_of(gsm8k, chats).items()
    }
    write_rows(FOLDER / "dates.jsonl", skills.rows(FORMATS))
    write_result(FOLDER / "texts.json", shortest)


# --- losses on other text -------------------------------------------------------------------------


def folder_of(arm: str, rate: float, seed: int) -> Path:
    return FOLDER / f"adapter={arm},optimizer.lr={rate:g},train.seed={seed}"


def file_of(run: Path, text: str) -> Path:
    return run / f"losses_{text}.safetensors"


def losses_of(model: PreTrainedModel, tokenizer: Any, rows: list[Row]) -> TokenLosses:
    """The loss of the first `TOKENS` tokens of every completion."""
    tokens = []
    losses = []
    for prompt, completion in rows:
        before = len(tokenizer(prompt).input_ids)
        ids = tokenizer(prompt + completion).input_ids[: before + TOKENS]
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            losses.append(completion_losses(model, ids, before))
        tokens.append(len(ids) - before)
    return TokenLosses(np.array(tokens), torch.cat(losses).numpy())


def measure() -> None:
    """Writes the losses of the base, and of every run that has ended, where they are missing."""
    ended = sorted(path.parent for path in FOLDER.glob("*/result.json"))
    if not ended:  # a clone has the frontiers alone
        return
    texts = json.loads((FOLDER / "texts.json").read_text())
    for run in [FOLDER, *ended]:
        if all(file_of(run, text).exists() for text in texts):
            continue
        config = load_config(ended[0] / "config.yaml").model
        model = load_model(config, torch.device("cpu"))
        if run != FOLDER:
            model = PeftModel.from_pretrained(model, run / "adapter")
        model.eval()
        for text, rows in texts.items():
            losses_of(model, load_tokenizer(config), rows).write(file_of(run, text))
        print(run, flush=True)


# --- frontiers ------------------------------------------------------------------------------------

Frontiers = dict[str, Any]
"""Of a seed: `tokens`, text -> those of each row, and for each arm its held-out `losses` of dates
[rates] and text -> rises over the base's loss [rates, rows], in nats a token."""


def gather(arms: Mapping[str, list[Path]]) -> Frontiers:
    """The frontiers of a seed, from the runs of its arms."""
    base = {text: TokenLosses.read(file_of(FOLDER, text)) for text in ROWS}
    found: Frontiers = {"tokens": {text: losses.tokens.tolist() for text, losses in base.items()}}
    for arm, runs in arms.items():
        found[arm] = {"losses": [TokenLosses.read(run / LOSSES_AFTER).mean for run in runs]}
        for text, losses in base.items():
            after = np.array([TokenLosses.read(file_of(run, text)).sums() for run in runs])
            found[arm][text] = ((after - losses.sums()) / losses.tokens).round(4).tolist()
    return found


def gather_ended() -> None:
    """Writes the frontiers of the seeds whose primary arms have been measured."""
    for seed in SEEDS:
        measured = {}
        for arm, rates in RATES.items():
            runs = [folder_of(arm, rate, seed) for rate in rates]
            if all(file_of(run, text).exists() for run in runs for text in ROWS):
                measured[arm] = runs
        if measured.keys() >= {"lora", "cera_identity", "cera"}:
            write_result(EVIDENCE / f"s{seed}.json", gather(measured))


def at_loss(losses: np.ndarray, values: np.ndarray, loss: float) -> np.ndarray:
    """Values [rows] where the loss first falls to `loss` as the rate rises, between two rates
    linear in its logarithm; not a number where it does not.

    Args:
        losses: [rates], from the smallest rate.
        values: [rates, rows].
    """
    above = np.log(losses / loss)
    for low, high in itertools.pairwise(range(len(losses))):
        if above[low] > 0 >= above[high]:
            share = above[low] / (above[low] - above[high])
            return (1 - share) * values[low] + share * values[high]
    return np.full(values.shape[1:], np.nan)


def compare(
    seeds: Sequence[Frontiers], text: str, first: str, second: str, loss: float
) -> dict[str, Any]:
    """Second - first arm where both reach this loss, over the seeds in which both do."""
    seeds = [seed for seed in seeds if {first, second} <= seed.keys()]
    tokens = seeds[0]["tokens"][text]
    values = np.array(
        [
            [
                at_loss(*map(np.array, (seed[arm]["losses"], seed[arm][text])), loss)
                for seed in seeds
            ]
            for arm in (first, second)
        ]
    )
    values = values[:, np.isfinite(values).all((0, 2))]
    found = contrast(*values, tokens)
    return {
        "asked": f"{text} at {loss:g}: {second} - {first}",
        **asdict(found),
        "detectable": detectable(found.variances, found.seeds, found.problems, len(PRIMARY)),
        "means": np.average(values, axis=2, weights=tokens).tolist(),
    }


def judge(seeds: Sequence[Frontiers]) -> dict[str, Any]:
    """Contrasts over these seeds."""
    found = {
        (text, arms, loss): compare(seeds, text, *arms, loss)
        for text, arms, loss in itertools.product(ROWS, (*PRIMARY, *OTHERS), LOSSES)
    }
    for loss in LOSSES:
        primary = [found["gsm8k", arms, loss] for arms in PRIMARY]
        if min(each["seeds"] for each in primary) >= REACHED * len(seeds):
            break
    return {
        "seeds": len(seeds),
        "primary": with_holm(primary),
        "beside": [each for each in found.values() if each not in primary],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows", type=Path, nargs=2, metavar=("GSM8K", "CHATS"), help="jsonl files"
    )
    options = parser.parse_args()
    if options.rows:
        write_texts(*options.rows)
        return
    measure()
    gather_ended()
    seeds = [json.loads(file.read_text()) for file in sorted(EVIDENCE.glob("s*.json"))]
    if not seeds:
        raise SystemExit(f"no seed has all its runs in {FOLDER}: cera-train -m +sweep=forgetting")
    found = judge(seeds)
    write_result(EVIDENCE / "judged.json", found)
    for each in found["primary"] + found["beside"]:
        line = "{asked} {difference:+.3f} ({lower:+.3f} to {upper:+.3f}), {seeds} seeds"
        print(line.format(**each), f"p {each['p_holm']:.3g}" if "p_holm" in each else "")


if __name__ == "__main__":
    main()
