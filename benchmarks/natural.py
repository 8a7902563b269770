"""How non-linear are the changes that full fine-tuning makes? `python -m benchmarks.natural --rows
gsm8k.jsonl chats.jsonl` tunes SmolLM2-135M on five kinds of text. What was tuned is not tuned
again.

A change is how the output of a projection moves on text of the task, as a function of the input
that it has in the untuned model. The best affine map explains a share of its variance, and the gain
of a gate is what a CeRA adds to that share. Mixtures sqrt(1 - d) linear + sqrt(d) even, those of
`benchmarks.dose`, on inputs from all the text are the scale: the dose of a change is the d of the
same gain.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.forgetting import texts_of
from benchmarks.one_projection import MODEL, Data, Mixture, best_of_rates, record
from benchmarks.rows import read_rows, write_result, write_rows
from cera_train.cli.compose import compose
from cera_train.data.computed import date_rows
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.settings.model import Dtype, ModelConfig
from cera_train.training.train import launch

FOLDER = Path("outputs/natural")
ROWS = 1_500
"""Of each text, at most."""
LETTERS = 400
"""Of a row, at most: about 100 tokens."""
TUNING = (
    "model=smollm2_135m_pypi model.dtype=float32 adapter=full data=jsonl "
    "data.max_length=128 data.eval_rows=50 data.allow_overlap=true train.batch_size=8 "
    "train.max_updates=100 train.eval_every=null train.save_every=null optimizer.schedule=linear "
    "optimizer.warmup_ratio=0.1"
)
LAYERS = (10, 20)
PLACES = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
DOSES = (0.0, 0.03, 0.1, 0.3, 1.0)
SEED = 0


# --- text -----------------------------------------------------------------------------------------


def texts(gsm8k: Path, chats: Path) -> dict[str, list[str]]:
    """Word problems, chats, dates to rewrite, and what packages ship: code, and paragraphs of their
    descriptions."""
    found = {name: list(map("".join, rows)) for name, rows in texts_of(gsm8k, chats).items()}
    found["dates"] = [row["prompt"] + row["completion"] for row in date_rows(ROWS, 0)[0]]
    models = Path(sysconfig.get_path("purelib"), "transformers", "models")
    files = sorted(models.glob("*/modeling_*.py"))
    found["code"] = [file.read_text()[4_000:] for file in files]
    described = "\n\n".join(str(package.metadata.get_payload()) for package in distributions())
    paragraphs = re.split(r"\n\n+", described)
    found["descriptions"] = [text for text in paragraphs if re.match(r"[A-Z][a-z ]{20}.*\.$", text)]
    return found


def write_texts(gsm8k: Path, chats: Path) -> None:
    """Writes different rows of each text in random order."""
    for name, found in texts(gsm8k, chats).items():
        rows = list(dict.fromkeys(text[:LETTERS] for text in found))
        random.Random(SEED).shuffle(rows)
        write_rows(FOLDER / f"{name}.jsonl", ({"text": row} for row in rows[:ROWS] if row))


# --- changes --------------------------------------------------------------------------------------

Seen = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""Layer and projection -> its inputs [N, d_in] and outputs [N, d_out]."""


def see(path: str, rows: list[str]) -> Seen:
    """What the projections of a model see of the rows."""
    config = ModelConfig(path=path, dtype=Dtype.float32)
    model = load_model(config, torch.device("cpu"))
    projections = {
        (layer, place): model.model.layers[layer].get_submodule(place)
        for layer, place in itertools.product(LAYERS, PLACES)
    }
    return record(model, load_tokenizer(config), rows, projections)


def shares(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """What share of the variance of y on held-out inputs the best affine map of x explains, and
    what a CeRA gains that is fitted to what it leaves."""
    data = Data.shuffled(x, y)
    affine = data.best_affine()
    explained = data.r2(affine)
    left = Data.of(data.x, (data.y - affine).float())
    return {"affine": explained, "gain": best_of_rates(left) * (1 - explained)}


def tune(name: str) -> str:
    """Tunes the model on a text, or finds what was; returns its folder."""
    words = f"{TUNING} data.train_files=[{FOLDER}/{name}.jsonl] output_dir={FOLDER} name={name}"
    launch(compose(*words.split()))
    return str(FOLDER / name / "adapter")


def measure() -> Iterator[dict[str, Any]]:
    """A dictionary for each layer, projection and text; the first of each projection has the
    scale."""
    rows = {file.stem: [row["text"] for row in read_rows(file)] for file in FOLDER.glob("*.jsonl")}
    names = sorted(rows)
    tuned = {name: see(tune(name), rows[name]) for name in names}
    before = {name: see(MODEL, rows[name]) for name in names}
    for layer, place in before[names[0]]:
        x = torch.cat([before[name][layer, place][0][:: len(names)] for name in names])
        d_out = before[names[0]][layer, place][1].shape[1]
        gains = [shares(x, Mixture(x, d_out, dose, SEED)(x))["gain"] for dose in DOSES]
        yield {"layer": layer, "place": place, "scale": gains}
        for name in names:
            inputs, outputs = before[name][layer, place]
            change = shares(inputs, tuned[name][layer, place][1] - outputs)
            dose = float(np.interp(change["gain"], gains, DOSES))
            yield {"layer": layer, "place": place, "text": name, "dose": dose} | change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, nargs=2, required=True)
    options = parser.parse_args()
    write_texts(*options.rows)
    found = []
    for each in measure():
        print(each)
        found.append(each)
        write_result(FOLDER / "natural.json", found)


if __name__ == "__main__":
    main()
