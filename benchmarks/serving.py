"""What adapters cost in vLLM: `.venv-serving/bin/python -m benchmarks.serving` (after `make test-serving`).

The bare base, one and four LoRAs, one and four CeRAs, at 1, 4 and 16 requests at once: tokens a second and the time to
the first token. All in one engine, round by round in turn, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

AT_ONCE = (1, 4, 16)
PROMPT, TOKENS = 64, 32
R = 16
KINDS = {"base": (None, 0), "1 LoRA": ("lora", 1), "1 CeRA": ("cera", 1), "4 LoRA": ("lora", 4), "4 CeRA": ("cera", 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a base model")
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
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


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Prints the table."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        arguments.model,
        dtype=arguments.dtype,
        enable_lora=True,
        max_lora_rank=R,
        max_loras=4,
        max_cpu_loras=8,
        max_model_len=512,
        max_num_seqs=max(AT_ONCE),
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
    )
    requests = {
        (kind, number): LoRARequest(
            f"{kind}{number}", 1 + number + 4 * (kind == "cera"), str(folder / f"{kind}{number}")
        )
        for kind, number in itertools.product(("lora", "cera"), range(4))
    }

    def seconds(kind: str | None, adapters: int, count: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [7 + (at * 31 + place) % 1000 for place in range(PROMPT)]} for at in range(count)
        ]
        chosen = [requests[kind, at % adapters] if kind else None for at in range(count)]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        engine.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - started

    cases = list(itertools.product(AT_ONCE, KINDS))
    for count, name in cases:
        seconds(*KINDS[name], count, 2)  # loads the adapters
    first: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    whole: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for count, name in cases:
            first[count, name].append(seconds(*KINDS[name], count, 1))
            whole[count, name].append(seconds(*KINDS[name], count, TOKENS))

    print(f"{arguments.targets}, r = {R}, {arguments.dtype}; prompts of {PROMPT} tokens, answers of {TOKENS}")
    print(f"{'requests':<10}{'':<8}{'tokens/s':>10}{'first token':>13}{'CeRA / LoRA':>13}")
    for count, name in cases:
        speed = count * TOKENS / statistics.median(whole[count, name])
        ratio = ""
        if name.endswith("CeRA"):
            pairs = zip(whole[count, name.replace("CeRA", "LoRA")], whole[count, name], strict=True)
            ratio = f"{statistics.median(lora / cera for lora, cera in pairs):.2f}"
        print(f"{count:<10}{name:<8}{speed:>10.0f}{statistics.median(first[count, name]):>11.2f} s{ratio:>13}")


if __name__ == "__main__":
    main()
