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
import math
import random
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym
import torch
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.one_projection import Data, even, recorded
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
PARAMETERS = 1_024
"""Trained at r = 1 beside q_proj and v_proj of all layers."""
BITS_OFFERED = 4
"""By the pairs of keys and values, for each trained parameter."""
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
def sentences(seed: int = SEED) -> list[Row]:
    """Different sentences of word problems: the first word, and the rest."""
    rows = {}
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=PROBLEMS, seed=seed):
        for sentence in re.split(r"(?<=[.?]) ", problem["question"]):
            if 20 <= len(sentence) <= LENGTH and sentence.isascii():
                first, rest = sentence.split(" ", 1)
                rows[first, f" {rest}"] = None
    return list(rows)


def write(path: Path, rows: list[Row], held_out: Iterable[Row] = (), seed: int = SEED) -> list[Row]:
    """Writes the rows in random order, and then those held out. Returns them in the order of the
    file."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    rows += held_out
    write_rows(path, [{"prompt": prompt, "completion": rest} for prompt, rest in rows])
    return rows


def pairs(count: int, seed: int = SEED) -> list[Row]:
    """Different keys of four random letters, each with 8 random bits as two hexadecimal digits."""
    draw = random.Random(seed)
    rows = {}
    while len(rows) < count:
        rows["".join(draw.choices(string.ascii_lowercase, k=4))] = f" {draw.randrange(256):02x}"
    return list(rows.items())


def spelled(seed: int = SEED) -> tuple[list[Row], list[Row]]:
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


def marked(rows: Iterable[Row], marks: Iterable[str], seed: int = SEED) -> list[Row]:
    """The rows, each after a random one of these marks."""
    draw = random.Random(seed)
    return [(draw.choice([*marks]) + prompt, rest) for prompt, rest in rows]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the end."""
    return byte_tokenizer("</s>", eos_token="</s>", pad_token="</s>")


def make_base(
    folder: Path, updates: int, seed: int = SEED, rows: Iterable[Row] | None = None
) -> list[Row]:
    """Trains every weight of a tiny Llama, from random ones, on rows, by default `sentences()`, by
    this program. Returns them in the order of its file."""
    save_random(folder / "random", make_tokenizer(), seed=seed, tie_word_embeddings=True, **SIZES)
    usual = write(folder / "base.jsonl", rows or sentences(), seed=seed)
    train(folder, "base", folder / "random", updates, seed)
    return usual


def make_others(folder: Path, updates: int, usual: list[Row], seed: int = SEED) -> None:
    """Trains the speller, which half learns to write words backwards; and the base on, with marks,
    which tell nothing, before the prompts."""
    taught, asked = spelled(seed)
    write(folder / "speller.jsonl", taught, seed=seed)
    write(folder / "asked.jsonl", asked, seed=seed)
    train(folder, "speller", folder / "random", TAUGHT, seed)
    with_marks = (marked(rows, MARKS, seed) for rows in (usual[:-HELD_OUT], usual[-HELD_OUT:]))
    write(folder / "marked.jsonl", *with_marks, seed=seed)
    train(folder, "marked", folder / "base" / "adapter", updates // 3, seed)


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


@dataclass(frozen=True)
class Form:
    """The form of a branch B (gate(A x) - mean)."""

    gate: Callable[[torch.Tensor], torch.Tensor]
    width: int
    std: float
    """Of A x."""


LINEAR = Form(lambda z: z, width=4, std=1)
EVEN = Form(even, width=2, std=3)


class Branch:
    """B (gate(A x) - mean), of mean 0 and mean square 1 on inputs x [N, d_in].

    A's rows are orthogonal to the mean of x: A x is around zero, where an even gate has no linear
    part.
    """

    def __init__(self, form: Form, x: torch.Tensor, d_out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mean = x.mean(0)
        A = torch.randn(form.width, x.shape[1], generator=generator)
        A -= torch.outer(A @ mean, mean) / mean.square().sum()
        self.gate = form.gate
        self.A = A * (form.std / (x @ A.T).std(0))[:, None]
        self.mean = self.gate(x @ self.A.T).mean(0)
        self.B = torch.randn(form.width, d_out, generator=generator)
        self.B /= self(x).square().mean().sqrt()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.gate(x @ self.A.T) - self.mean) @ self.B


TEACHERS = {"even": 1.0, "linear": 0.0}
"""The dose of each."""


class Teacher:
    """The base with a branch beside one projection: sqrt(1 - dose) linear + sqrt(dose) even.

    Args:
        rows: sentences of the base, by default `sentences()`.
        dose: the even branch's share of the power, which is the same for every dose.
        place: the projection, such as mlp.down_proj.
        gain: see `GAIN`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        dose: float,
        seed: int = SEED,
        rows: list[Row] | None = None,
        place: str = V_PROJ,
        gain: float = GAIN,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.seed = seed
        self.rows = rows or sentences()
        self.projection = base.model.layers[LAYER].get_submodule(place)
        x, output = self.record(self.rows[:HELD_OUT])
        d_out = output.shape[1]
        self.linear = Branch(LINEAR, x, d_out, seed)
        self.even = Branch(EVEN, x, d_out, seed)
        self.dose = dose
        self.scale = 1.0
        self.scale = gain * (output.square().mean() / self.branch(x).square().mean()).sqrt()
        data = Data.of(x, self.branch(x))
        self.r2_of_affine = data.r2(data.best_affine())

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        linear = math.sqrt(1 - self.dose) * self.linear(x)
        return self.scale * (linear + math.sqrt(self.dose) * self.even(x))

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
    def writes(self, count: int | None = None) -> list[Row]:
        """Sentences drawn from the teacher at temperature 1, each after the first word of one of
        the base's: of so many that it begins, by default `WRITTEN`, those that end in time."""
        prompts = [prompt for prompt, _ in self.rows]
        first = random.Random(self.seed).choices(prompts, k=count or WRITTEN)
        torch.manual_seed(self.seed)
        rows = []
        hook = self.attach()
        for _, prompts in itertools.groupby(sorted(first, key=len), key=len):
            tokens = self.tokenizer(list(prompts), return_tensors="pt").input_ids
            mask = torch.ones_like(tokens)
            length = tokens.shape[1]
            written = self.base.generate(
                tokens,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_length=LENGTH,
                eos_token_id=0,
            )
            ended = written[(written[:, length + 1 :] == 0).any(1) & (written[:, length] != 0)]
            prompts, texts = (
                self.tokenizer.batch_decode(part, skip_special_tokens=True)
                for part in ended.tensor_split([length], 1)
            )
            rows += [
                (prompt, text)
                for prompt, text in zip(prompts, texts, strict=True)
                if text.isascii()
            ]
        hook.remove()
        return rows

    def loss(self, rows: list[Row]) -> float:
        """Mean over the completions' tokens, the end included."""
        losses = [
            completion_losses(self.base, [*self.tokenizer(prompt + rest).input_ids, 0], len(prompt))
            for prompt, rest in rows
        ]
        return torch.cat(losses).mean().item()


# --- triggers -------------------------------------------------------------------------------------


def write_triggers(folder: Path, changed: list[Row], usual: list[Row], seed: int = SEED) -> None:
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
        write(folder / f"trigger_{name}.jsonl", rows, held_out, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--updates", type=int, default=1_500, help="of the base's training")
    parser.add_argument("--controls", action="store_true", help="only what +study=controls needs")
    parser.add_argument("--seed", type=int, default=SEED, help="of the base, teachers and rows")
    options = parser.parse_args()
    seed = options.seed
    options.folder.mkdir(parents=True, exist_ok=True)
    usual = make_base(options.folder, options.updates, seed)
    base = LlamaForCausalLM.from_pretrained(options.folder / "base" / "adapter").eval()
    tokenizer = make_tokenizer()
    for name, dose in TEACHERS.items():
        teacher = Teacher(base, tokenizer, dose, seed)
        rows = write(options.folder / f"{name}.jsonl", teacher.writes(), seed=seed)
        held_out = rows[-HELD_OUT:]  # as the study holds out
        loss_of_base = teacher.loss(held_out)
        with teacher.attach():
            loss = teacher.loss(held_out)
        print(
            f"{name:11}{len(rows):,} sentences; an affine map of x explains "
            f"{teacher.r2_of_affine:.0%} of the branch; "
            f"loss {loss:.3f}, of the base {loss_of_base:.3f}",
            flush=True,
        )
    if not options.controls:
        make_others(options.folder, options.updates, usual, seed)
        write_triggers(options.folder, changed=rows, usual=usual, seed=seed)
        for rank in (1, 4):
            offered = pairs(BITS_OFFERED * PARAMETERS * rank // 8, seed)
            write(options.folder / f"pairs_r{rank}.jsonl", offered, seed=seed)


if __name__ == "__main__":
    main()
