"""What adapters cost in vLLM: `.venv-serving/bin/python -m benchmarks.serving` (after `make test-serving`).

The bare base, one and four LoRAs, one and four CeRAs, at 1, 4 and 16 requests at once: tokens a second and the time to
the first token. With the plugin, a batch of LoRA goes through the gates too, so a second engine without it serves LoRA:
that is what CeRA is held to. Round by round in turn, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

AT_ONCE = (1, 4, 16)
PROMPT, TOKENS = 64, 32
R = 16
PLAIN = ", no plugin"
KINDS = {
    "base": (None, 0),
    **{f"{number} LoRA{plugin}": ("lora", number) for number in (1, 4) for plugin in (PLAIN, "")},
    **{f"{number} CeRA": ("cera", number) for number in (1, 4)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a base model")
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(arguments.model, arguments.targets.split(","), Path(folder))
        measure(arguments, Path(folder))


def make_adapters(base: str, targets: list[str], folder: Path) -> None:
    """Four adapters of each kind, with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cera_train.cera import CeraConfig

    for kind, number in itertools.product(("lora", "cera"), range(4)):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = (
            LoraConfig(r=R, lora_alpha=R, target_modules=targets, init_lora_weights=False)
            if kind == "lora"
            else CeraConfig(r=R, target_modules=targets, init_weights=False)
        )
        get_peft_model(model, config).save_pretrained(folder / f"{kind}{number}")


def start_engine(arguments: argparse.Namespace, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=512,
        max_num_seqs=max(AT_ONCE),
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
        **settings,
    )


def generate_seconds(engine: Any, requests: list[Any], tokens: int) -> float:
    """Seconds of as many answers at once as there are LoRA requests; None: the base answers."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [7 + (at * 31 + place) % 1000 for place in range(PROMPT)]} for at in range(len(requests))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Prints the table."""
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, begin, (arguments, folder, None)) as served,
        ProcessPoolExecutor(1, spawn, begin, (arguments, folder, "")) as plain,
    ):
        for pool in (served, plain):  # one after the other: a start takes both cores
            pool.submit(answer_seconds, None, 0, 1, 2).result()

        def seconds(case: tuple[int, str], tokens: int) -> float:
            count, name = case
            pool = plain if name.endswith(PLAIN) else served
            return pool.submit(answer_seconds, *KINDS[name], count, tokens).result()

        cases = list(itertools.product(AT_ONCE, KINDS))
        for case in cases:
            seconds(case, 2)  # loads the adapters
        first: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
        whole: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for case in cases:
                first[case].append(seconds(case, 1))
                whole[case].append(seconds(case, TOKENS))

    print(f"{arguments.targets}, r = {R}, {arguments.dtype}; prompts of {PROMPT} tokens, answers of {TOKENS}")
    print(f"{'requests':<10}{'':<18}{'tokens/s':>10}{'first token':>13}{'of plain LoRA':>15}")
    for count, name in cases:
        speed = count * TOKENS / statistics.median(whole[count, name])
        ratio, number = "", KINDS[name][1]
        if number and not name.endswith(PLAIN):
            pairs = zip(whole[count, f"{number} LoRA{PLAIN}"], whole[count, name], strict=True)
            ratio = f"{statistics.median(lora / ours for lora, ours in pairs):.2f}"
        print(
            f"{count:<10}{name:<18}{speed:>10.0f}{statistics.median(first[count, name]):>11.2f} s{ratio:>15}".rstrip()
        )


def begin(arguments: argparse.Namespace, folder: Path, plugins: str | None) -> None:
    """Starts the engine of this process.

    Args:
        plugins: vLLM's list of plugins that it loads; None: all.
    """
    global engine, requests
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins
    from vllm.lora.request import LoRARequest

    engine = start_engine(arguments, enable_lora=True, max_lora_rank=R, max_loras=4, max_cpu_loras=8)
    requests = {
        (kind, number): LoRARequest(
            f"{kind}{number}", 1 + number + 4 * (kind == "cera"), str(folder / f"{kind}{number}")
        )
        for kind, number in itertools.product(("lora", "cera"), range(4))
    }


def answer_seconds(kind: str | None, adapters: int, count: int, tokens: int) -> float:
    """Seconds in which this process's engine answers so many requests at once, over its adapters of a kind."""
    return generate_seconds(engine, [requests[kind, at % adapters] if kind else None for at in range(count)], tokens)


if __name__ == "__main__":
    main()
