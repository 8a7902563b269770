"""Whether two commits train the same: `python -P benchmarks/same_results.py --write before.json` at
one of them, `--against before.json` at the other; PYTHONPATH chooses the tree. Twelve tiny
configurations in float32 are trained by the command line alone, so that this file runs unchanged at
every commit. They are the same where losses, rewards, perplexity and the norm of the adapter agree
to 1e-6."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

TOLERANCE = 1e-6
CONFIGURATIONS = {
    "CeRA": ["adapter=cera"],
    "LoRA": ["adapter=lora"],
    "DoRA": ["adapter=dora"],
    "PiSSA": ["adapter=pissa", "adapter.dropout=0"],
    "mix": ["adapter=cera_mix"],
    "experts": [
        "adapter=cera",
        "adapter.target_modules=all-linear",
        "adapter.experts=true",
        "model.path=mixture",
    ],
    "NF4": ["adapter=cera", "model.quantization=nf4"],
    "two processes": ["adapter=cera", "launch.processes=2"],
    "resume after a kill": ["adapter=cera"],
    "DPO": [
        "adapter=cera",
        "train.objective=dpo",
        "dpo.sft_weight=0.5",
        "data.train_files=[train_pairs.jsonl]",
        "data.eval_files=[eval_pairs.jsonl]",
    ],
    "GRPO": [
        "adapter=cera",
        "train.objective=grpo",
        "grpo.rewards=[rewards.evenness]",
        "grpo.answers=4",
        "grpo.max_new_tokens=6",
        "grpo.epochs=2",
        "grpo.beta=0.1",
        "train.batch_size=4",
    ],
    "study": ["-m", "--config-dir=conf", "+study=two_arms"],
}
COMMON = [
    "model.path=llama",
    "model.dtype=float32",
    "data=jsonl",
    "data.train_files=[train.jsonl]",
    "data.eval_files=[eval.jsonl]",
    "data.max_length=64",
    "adapter.r=4",
    "adapter.alpha=null",
    "adapter.dropout=0.1",
    "adapter.target_modules=[q_proj,v_proj]",
    "optimizer.lr=1e-2",
    "optimizer.schedule=constant",
    "optimizer.warmup_ratio=0",
    "train.patience=null",
    "train.batch_size=16",
    "train.micro_batch_tokens=256",
    "train.max_updates=12",
    "train.eval_every=4",
    "train.save_every=4",
]
STUDY = """
# @package _global_
defaults: [{override /hydra/sweeper: study}]
study:
  question: Is CeRA better than LoRA?
  arms: {lora: [adapter=lora], cera: [adapter=cera]}
  baseline: lora
  tune: {optimizer.lr: [1e-2]}
  seeds: 2
"""
REWARDS = """
def evenness(prompt, answer, gold):
    return sum(ord(letter) % 2 == 0 for letter in answer)
"""


def make_inputs() -> None:
    """The tiny models, the rows, the reward and the study, in the working folder."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    sizes = dict(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    sizes |= dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    for folder, model in (("llama", llama), ("mixture", mixture)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    draw = random.Random(0)
    for split, count in (("train", 79), ("eval", 13)):
        pairs = [(draw.randrange(100), draw.randrange(1000)) for _ in range(count)]
        rows = [
            {"prompt": f"{first}+{second}=", "completion": str(first + second)}
            for first, second in pairs
        ]
        preferences = [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": row["completion"][::-1] + "0",
            }
            for row in rows
        ]
        write_rows(f"{split}.jsonl", rows)
        write_rows(f"{split}_pairs.jsonl", preferences)
    Path("rewards.py").write_text(REWARDS.lstrip())
    Path("conf/study").mkdir(parents=True)
    Path("conf/study/two_arms.yaml").write_text(STUDY.lstrip())


def write_rows(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(name: str, words: list[str]) -> Path:
    """Trains a configuration and returns its folder."""
    folder = Path("outputs") / name.replace(" ", "_")
    command = [sys.executable, "-m", "cera_train", *COMMON, *words, f"name={folder.name}"]
    if name == "resume after a kill":
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as killed:
            while killed.poll() is None and not (folder / "checkpoints" / "4").exists():
                time.sleep(0.005)
            killed.kill()
        assert not (folder / "result.json").exists(), "the run was over before it could be killed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip())
    return folder


def measure(folder: Path) -> dict:
    """Losses, rewards, perplexity and adapter of a run, or of all runs of a study."""
    losses = []
    perplexity = []
    digest = hashlib.sha256()
    square = 0.0
    for result in sorted(folder.rglob("result.json")):
        lines = [
            json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()
        ]
        losses += [
            line[key]
            for line in lines
            for key in ("train/loss", "train/reward", "eval/loss")
            if key in line
        ]
        perplexity.append(json.loads(result.read_text())["eval/perplexity"])
        for key, tensor in sorted(
            load_file(result.parent / "adapter" / "adapter_model.safetensors").items()
        ):
            digest.update(key.encode() + tensor.numpy().tobytes())
            square += float(tensor.double().square().sum())
    return {
        "losses": losses,
        "perplexity": perplexity,
        "norm": [square**0.5],
        "sha256": digest.hexdigest(),
    }


def compare(before: dict, after: dict) -> tuple[bool, str]:
    """Whether two measurements are the same, and a remark on how."""
    if before == after:
        return True, "equal"
    numbers = [
        [*result["losses"], *result["perplexity"], *result["norm"]] for result in (before, after)
    ]
    if len(numbers[0]) != len(numbers[1]):
        return False, f"DIFFERS: {len(numbers[0])} numbers, now {len(numbers[1])}"
    largest = max(abs(first - second) for first, second in zip(*numbers, strict=True))
    return (
        largest <= TOLERANCE,
        f"largest difference {largest:.3g}, {'same' if largest <= TOLERANCE else 'DIFFERS'}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--write", "--against"):
        parser.add_argument(option, type=lambda name: Path(name).absolute(), metavar="FILE.json")
    arguments = parser.parse_args()
    expected = json.loads(arguments.against.read_text()) if arguments.against else {}
    package = Path(importlib.util.find_spec("cera_train").origin).parent
    os.environ |= {
        "PYTHONPATH": str(package.parent),
        "OMP_NUM_THREADS": "1",
        "CERA_TRAIN_CACHE": "cache",
    }
    print(package)
    results = {}
    all_same = True
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_inputs()
        for name, words in CONFIGURATIONS.items():
            try:
                result = results[name] = measure(train(name, words))
            except RuntimeError as error:
                print(f"{name}: FAILED {error}", flush=True)
                all_same = False
                continue
            is_same, remark = compare(expected[name], result) if expected else (True, "")
            all_same &= is_same
            losses, perplexity = (
                " ".join(f"{value:.9g}" for value in result[key])
                for key in ("losses", "perplexity")
            )
            print(
                f"{name}: losses {losses}; perplexity {perplexity}; sha256 {result['sha256']} "
                f"{remark}",
                flush=True,
            )
    if arguments.write:
        arguments.write.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
