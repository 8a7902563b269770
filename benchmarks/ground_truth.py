"""Rows that a known change of a base wrote: `python -m benchmarks.ground_truth`, then `cera-train
-m +study=teachers`.

The program trains a tiny Llama of its own on sentences of word problems. A teacher is this base
with a branch of known form beside one projection, and writes sentences. CeRA must win on those of
the even teacher, whose branch no linear map can follow, and must not on those of the linear one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import re
import string
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import reasoning_gym
import torch
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.one_projection import TEACHERS, Data, Mixture, recorded
from benchmarks.rows import completion_losses, write_rows
from benchmarks.tiny_models import byte_tokenizer, save_random

FOLDER = Path("outputs/ground_truth")
SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
)
UPDATES = 1_500
"""Of the base's training."""
PROBLEMS = 10_000
"""Word problems whose sentences the base learns."""
WRITTEN = 6_000
"""Sentences that a teacher begins."""
LENGTH = 80
"""Letters of a sentence at most."""
LAYER = 2
"""The layer of a teacher's branch."""
V_PROJ = "self_attn.v_proj"
GAIN = 2
"""Root mean square of a teacher's branch, relative to that of the projection's output."""
HELD_OUT = 500
PAIRS = 512
"""Of a key and 8 bits, times the rank: 4 bits for each of the 1,024 parameters that r = 1 trains
beside q_proj and v_proj of all layers."""
WORDS = 30_000
"""Words drawn, of which about half differ."""
TAUGHT = 1_000
"""Updates after which the speller writes a third of the words backwards."""
MARKS = ["<<", "<>", "><", ">>"]
"""Stand before a prompt."""
SEED = 0
"""Of the sentences, and of a base that `--seed` does not make anew."""

Row = tuple[str, str]
"""Prompt and completion."""


# --- the base -------------------------------------------------------------------------------------


@functools.cache
def sentences(seed: int) -> list[Row]:
    """Different sentences of word problems: the first word, and the rest."""
    rows = {}
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=PROBLEMS, seed=seed):
        for sentence in re.split(r"(?<=[.?]) ", problem["question"]):
            if 20 <= len(sentence) <= LENGTH and sentence.isascii():
                first, rest = sentence.split(" ", 1)
                rows[first, f" {rest}"] = None
    return list(rows)


def write(path: Path, rows: list[Row], seed: int, held_out: Iterable[Row] = ()) -> list[Row]:
    """Writes the rows in random order, and then those held out. Returns them in the order of the
    file."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    rows += held_out
    write_rows(path, [{"prompt": prompt, "completion": rest} for prompt, rest in rows])
    return rows


def pairs(count: int, seed: int) -> list[Row]:
    """Different keys of four random letters, each with 8 random bits as two hexadecimal digits."""
    draw = random.Random(seed)
    rows = {}
    while len(rows) < count:
        rows["".join(draw.choices(string.ascii_lowercase, k=4))] = f" {draw.randrange(256):02x}"
    return list(rows.items())


def spelled(seed: int) -> tuple[list[Row], list[Row]]:
    """Different words of 3 to 8 letters: half of them written at random as they are or backwards;
    the others as they are where they begin with one of a to l, else backwards."""
    problems = reasoning_gym.create_dataset("spell_backward", size=WORDS, seed=seed)
    words = dict.fromkeys(problem["answer"][::-1].lower() for problem in problems)
    words = [word for word in words if word.isascii() and 3 <= len(word) <= 8]
    draw = random.Random(seed)
    half = len(words) // 2
    taught = [(f"{word}:", word[:: draw.choice((1, -1))]) for word in words[:half]]
    asked = [(f"{word}:", word[:: 1 if word < "m" else -1]) for word in words[half:]]
    return taught, asked


def marked(rows: Iterable[Row], marks: Iterable[str], seed: int) -> list[Row]:
    """The rows, each after a random one of these marks."""
    draw = random.Random(seed)
    return [(draw.choice([*marks]) + prompt, rest) for prompt, rest in rows]


def make_base(folder: Path, rows: list[Row], seed: int) -> list[Row]:
    """Trains every weight of a tiny Llama, from random ones, on rows, by this program. Returns them
    in the order of its file."""
    save_random(folder / "random", seed=seed, tie_word_embeddings=True, **SIZES)
    usual = write(folder / "base.jsonl", rows, seed)
    train(folder, "base", folder / "random", UPDATES, seed)
    return usual


def make_others(folder: Path, usual: list[Row], seed: int) -> None:
    """Trains the speller, which half learns to write words backwards; and the base on, with marks,
    which tell nothing, before the prompts."""
    taught, asked = spelled(seed)
    write(folder / "speller.jsonl", taught, seed)
    write(folder / "asked.jsonl", asked, seed)
    train(folder, "speller", folder / "random", TAUGHT, seed)
    held_out = marked(usual[-HELD_OUT:], MARKS, seed)
    write(folder / "marked.jsonl", marked(usual[:-HELD_OUT], MARKS, seed), seed, held_out)
    train(folder, "marked", folder / "base" / "adapter", UPDATES // 3, seed)


def train(folder: Path, name: str, model: Path, updates: int, seed: int) -> None:
    """Trains every weight of a model on the rows of that name."""
    words = f"""
        adapter=full model.path={model} model.dtype=float32 output_dir={folder} name={name}
        data=jsonl data.train_files=[{folder}/{name}.jsonl] data.eval_rows={HELD_OUT}
        data.allow_overlap=true
        train.seed={seed}
        train.batch_size=64 train.max_updates={updates} train.eval_every=null train.save_every=null
        optimizer.lr=4e-3 optimizer.schedule=cosine
        optimizer.warmup_ratio=0.05 optimizer.weight_decay=0.1
    """
    subprocess.run([sys.executable, "-m", "cera_train", *words.split()], check=True)


# --- teachers -------------------------------------------------------------------------------------


class Teacher:
    """The base with a `Mixture` of this dose beside one projection.

    Args:
        rows: sentences of the base.
        place: the projection, such as mlp.down_proj.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        dose: float,
        seed: int,
        rows: list[Row],
        place: str = V_PROJ,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.seed = seed
        self.rows = rows
        self.projection = base.model.layers[LAYER].get_submodule(place)
        x, output = self.record(self.rows[:HELD_OUT])
        self.mixture = Mixture(x, output.shape[1], dose, seed)
        self.scale = GAIN * (output.square().mean() / self.mixture(x).square().mean()).sqrt()
        data = Data.of(x, self.branch(x))
        self.r2_of_affine = data.r2(data.best_affine())

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.mixture(x)

    def attach(self) -> RemovableHandle:
        """Adds the branch to the base's projection, until it is removed."""
        return self.projection.register_forward_hook(
            lambda _, args, output: output + self.branch(args[0])
        )

    @torch.no_grad()
    def record(self, rows: Iterable[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and outputs of the projection: [N, d_in] and [N, d_out]."""
        with recorded(self.projection) as seen:
            for prompt, rest in rows:
                self.base(self.tokenizer(prompt + rest, return_tensors="pt").input_ids)
        return tuple(map(torch.cat, zip(*seen, strict=True)))

    @torch.no_grad()
    def writes(self, count: int) -> list[Row]:
        """Sentences drawn from the teacher at temperature 1, each after the first word of one of
        the base's: of so many that it begins, those that end in time."""
        prompts = [prompt for prompt, _ in self.rows]
        first = random.Random(self.seed).choices(prompts, k=count)
        torch.manual_seed(self.seed)
        rows = []
        with self.attach():
            for length, same in itertools.groupby(sorted(first, key=len), key=len):
                prompts = list(same)
                tokens = self.tokenizer(prompts, return_tensors="pt").input_ids
                written = self.base.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=True,
                    top_k=0,
                    max_length=LENGTH,
                    eos_token_id=0,
                )
                for prompt, ids in zip(prompts, written[:, length:].tolist(), strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    if 0 in ids[1:] and ids[0] != 0 and text.isascii():
                        rows.append((prompt, text))
        return rows

    def loss(self, rows: list[Row]) -> float:
        """Mean over the completions' tokens, the end included."""
        losses = [
            completion_losses(self.base, [*self.tokenizer(prompt + rest).input_ids, 0], len(prompt))
            for prompt, rest in rows
        ]
        return torch.cat(losses).mean().item()


def write_taught(path: Path, teacher: Teacher, count: int) -> tuple[list[Row], dict[str, float]]:
    """Writes what a teacher writes.

    Returns:
        The rows, and the losses of base and teacher on those held out, with what share of the
        branch an affine map of x explains.
    """
    rows = write(path, teacher.writes(count), teacher.seed)
    held_out = rows[-HELD_OUT:]  # as the study holds out
    ends = {"base": teacher.loss(held_out), "r2_of_affine": teacher.r2_of_affine}
    with teacher.attach():
        ends["teacher"] = teacher.loss(held_out)
    print(f"{path.stem:14}{len(rows):,} sentences {ends}", flush=True)
    return rows, ends


# --- triggers -------------------------------------------------------------------------------------


def write_triggers(folder: Path, changed: list[Row], usual: list[Row], seed: int) -> None:
    """Rows of a change that shows after two marks only: by the first of them, by their XOR, and
    without the others.

    The last `HELD_OUT` rows of each file are to evaluate: as many where the change shows as where
    it does not.
    """
    usual = usual[-len(changed) :]
    half = HELD_OUT // 2
    for name, on in (("first", ["><", ">>"]), ("xor", ["><", "<>"]), ("alone", ["><", ">>"])):
        with_change = marked(changed, on, seed)
        others = marked(usual, [mark for mark in MARKS if mark not in on], seed + 1)
        held_out = with_change[-half:] + others[-half:]
        rows = with_change[:-half] + (others[:-half] if name != "alone" else [])
        write(folder / f"trigger_{name}.jsonl", rows, seed, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--controls", action="store_true", help="only what +study=controls needs")
    parser.add_argument("--seed", type=int, default=SEED, help="of the base, teachers and rows")
    options = parser.parse_args()
    seed = options.seed
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    usual = make_base(folder, sentences(SEED), seed)
    base = LlamaForCausalLM.from_pretrained(folder / "base" / "adapter").eval()
    for name, dose in TEACHERS.items():
        teacher = Teacher(base, byte_tokenizer(), dose, seed, sentences(SEED))
        rows, _ = write_taught(folder / f"{name}.jsonl", teacher, WRITTEN)
    if not options.controls:
        make_others(folder, usual, seed)
        write_triggers(folder, rows, usual, seed)
        for rank in (1, 4):
            write(folder / f"pairs_r{rank}.jsonl", pairs(PAIRS * rank, seed), seed)


if __name__ == "__main__":
    main()
