"""What a model forgets while it learns 32 conflicting formats, at a held-out loss that every method
reaches: `python -m benchmarks.forgetting --rows gsm8k/test.jsonl chats.jsonl`, `cera-train -m
+sweep=forgetting`, then `python -m benchmarks.forgetting`, also before all runs have ended.

Each method has a frontier over its rates: the held-out loss, and the rise of the loss on other text
over the base's. Methods are compared where their frontiers reach one loss, seed by seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import cera_train  # noqa: F401  registers CeRA with PEFT
from benchmarks import skills
from cera_train.evaluation.statistics import holm
from cera_train.evaluation.verdict import contrast, detectable
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.runs.records import load_config
from cera_train.runs.results import LOSSES_AFTER, TokenLosses

FOLDER = Path("outputs/forgetting")
ARMS = ("lora", "lora_kaiming", "cera_identity", "cera")
RATES = (0.0028, 0.004, 0.0056, 0.008)
SEEDS = range(5, 17)
FORMATS = 32
ROWS = {"gsm8k": 300, "chats": 60}
"""Of each text, those with the shortest prompts."""
TOKENS = 40
"""Of a completion, at most: with short prompts, all rows cost a minute of one core."""
LOSSES = (0.10, 0.14, 0.2)
"""The first that every arm reaches in three quarters of the seeds is the primary one."""
REACHED = 0.75
PRIMARY = (("lora", "cera"), ("lora", "cera_identity"), ("cera_identity", "cera"))
OTHERS = (("lora", "lora_kaiming"), ("lora_kaiming", "cera"))

Row = tuple[str, str]
"""Prompt and completion."""


# --- rows -----------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(gsm8k: Path, chats: Path) -> None:
    """Writes the rows of dates that are learned, with those held out last, and other text: word
    problems, and the first answers of chats in ShareGPT's layout."""

    def said(chat: dict[str, Any], speaker: str) -> str:
        return next(turn["value"] for turn in chat["conversations"] if turn["from"] == speaker)

    texts = {
        "gsm8k": [
            (f"Question: {row['question']}\nAnswer:", f" {row['answer']}")
            for row in lines_of(gsm8k)
        ],
        "chats": [
            (f"User: {said(chat, 'human')}\nAssistant:", f" {said(chat, 'gpt')}")
            for chat in lines_of(chats)
            if said(chat, "human").isascii()
        ],
    }
    shortest = {
        text: sorted(rows, key=lambda row: len(row[0]))[: ROWS[text]]
        for text, rows in texts.items()
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in skills.rows(FORMATS)]
    (FOLDER / "dates.jsonl").write_text("".join(lines))
    (FOLDER / "texts.json").write_text(json.dumps(shortest, indent=1) + "\n")


# --- losses on other text -------------------------------------------------------------------------


def folder_of(arm: str, rate: float, seed: int) -> Path:
    return FOLDER / f"adapter={arm},optimizer.lr={rate:g},train.seed={seed}"


def file_of(run: Path, text: str) -> Path:
    return run / f"losses_{text}.safetensors"


@torch.no_grad()
def losses_of(model: PreTrainedModel, tokenizer: Any, rows: list[Row]) -> TokenLosses:
    """The loss of the first `TOKENS` tokens of every completion."""
    tokens = []
    losses = []
    for prompt, completion in rows:
        before = len(tokenizer(prompt).input_ids)
        ids = torch.tensor(tokenizer(prompt + completion).input_ids[: before + TOKENS])
        completed = ids[before:]
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            logits = model(ids[None], logits_to_keep=len(completed) + 1).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, completed, reduction="none"))
        tokens.append(len(completed))
    return TokenLosses(np.array(tokens), torch.cat(losses).numpy())


def measure() -> None:
    """Writes the losses of the base, and of every run that has ended, where they are missing."""
    texts = json.loads((FOLDER / "texts.json").read_text())
    ended = sorted(path.parent for path in FOLDER.glob("*/result.json"))
    runs = [FOLDER, *ended] if ended else []
    for run in runs:
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


def at_loss(losses: np.ndarray, values: np.ndarray, loss: float) -> np.ndarray | None:
    """Values where the loss first falls to `loss` as the rate rises, between two rates linear in
    its logarithm; None where it does not.

    Args:
        losses: [rates], from the smallest rate.
        values: [rates, rows].
    """
    above = np.log(losses / loss)
    for low, high in zip(range(len(losses)), range(1, len(losses)), strict=False):
        if above[low] > 0 >= above[high]:
            share = above[low] / (above[low] - above[high])
            return (1 - share) * values[low] + share * values[high]
    return None


class Frontiers:
    """The runs of a seed.

    Attributes:
        losses: arm -> [rates] held-out losses of what is learned.
        rises: text and arm -> [rates, rows] rises over the base's loss, in nats a token.
    """

    def __init__(self, seed: int) -> None:
        self.losses = {}
        self.rises = {}
        for arm in ARMS:
            runs = [folder_of(arm, rate, seed) for rate in RATES]
            self.losses[arm] = np.array([TokenLosses.read(run / LOSSES_AFTER).mean for run in runs])
            for text in ROWS:
                base, *after = (TokenLosses.read(file_of(run, text)) for run in (FOLDER, *runs))
                rises = [losses.sums() - base.sums() for losses in after]
                self.rises[text, arm] = np.array(rises) / base.tokens


def compare(
    seeds: list[Frontiers], text: str, arms: tuple[str, str], loss: float
) -> dict[str, Any]:
    """Second - first arm where both reach this loss, over the seeds in which both do."""
    pairs = [
        [at_loss(seed.losses[arm], seed.rises[text, arm], loss) for arm in arms] for seed in seeds
    ]
    pairs = [pair for pair in pairs if all(values is not None for values in pair)]
    named = {"text": text, "loss": loss, "first": arms[0], "second": arms[1], "seeds": len(pairs)}
    if len(pairs) < 2:
        return named | {"p_value": 1.0}
    tokens = TokenLosses.read(file_of(FOLDER, text)).tokens
    first, second = np.array(pairs).swapaxes(0, 1)
    found = contrast(first, second, tokens)
    least = detectable(found.variances, found.seeds, found.problems, len(PRIMARY))
    means = {
        arm: np.average(values, axis=1, weights=tokens).tolist()
        for arm, values in zip(arms, (first, second), strict=True)
    }
    return named | asdict(found) | {"detectable": least, "means": means}


def judge() -> dict[str, Any]:
    """Every contrast over the seeds whose runs have all ended; over the primary ones, Holm's
    correction."""
    ended = [
        seed
        for seed in SEEDS
        if all(
            (folder_of(arm, rate, seed) / "result.json").exists() for arm in ARMS for rate in RATES
        )
    ]
    seeds = [Frontiers(seed) for seed in ended]
    primary_loss = next((loss for loss in LOSSES if is_reached(seeds, loss)), LOSSES[-1])
    primary = [compare(seeds, "gsm8k", arms, primary_loss) for arms in PRIMARY]
    p_values = holm([each["p_value"] for each in primary])
    return {
        "seeds": ended,
        "rates": RATES,
        "primary": [each | {"p_holm": p} for each, p in zip(primary, p_values, strict=True)],
        "secondary": [
            compare(seeds, text, arms, loss)
            for text in ROWS
            for loss in LOSSES
            for arms in (*PRIMARY, *OTHERS)
            if (text, loss) != ("gsm8k", primary_loss) or arms in OTHERS
        ],
        "losses": {arm: [seed.losses[arm].tolist() for seed in seeds] for arm in ARMS},
        "rises": {
            text: {arm: [mean_rises(seed, text, arm) for seed in seeds] for arm in ARMS}
            for text in ROWS
        },
    }


def is_reached(seeds: list[Frontiers], loss: float) -> bool:
    """Whether every arm reaches this loss, within its rates, in enough of the seeds."""
    return all(
        np.mean([at_loss(seed.losses[arm], seed.losses[arm], loss) is not None for seed in seeds])
        >= REACHED
        for arm in ARMS
    )


def mean_rises(seed: Frontiers, text: str, arm: str) -> list[float]:
    """[rates] nats a token."""
    tokens = TokenLosses.read(file_of(FOLDER, text)).tokens
    return np.average(seed.rises[text, arm], axis=1, weights=tokens).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows", type=Path, nargs=2, metavar=("GSM8K", "CHATS"), help="jsonl files"
    )
    options = parser.parse_args()
    if options.rows:
        write_rows(*options.rows)
        return
    measure()
    found = judge()
    (FOLDER / "forgetting.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"seeds {found['seeds']}: second - first, in nats a token")
    for each in found["primary"] + found["secondary"]:
        what = f"{each['text']} at {each['loss']}, {each['second']} - {each['first']}"
        if "difference" in each:
            what += " {difference:+.3f} ({lower:+.3f} to {upper:+.3f})".format(**each)
        print(f"{what}, {each['seeds']} seeds, p {each.get('p_holm', each['p_value']):.3g}")


if __name__ == "__main__":
    main()
