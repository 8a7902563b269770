"""What the tests of serving ask, and what transformers and PEFT answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BASE = "base"
PROMPTS = [[5, 9, 23, 41], [7, 7, 7], [100, 3, 50, 60, 70, 80], [11, 2]]
TOKENS = 8
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
"""vLLM's environment."""


def save_base(folder: Path, tokenizer) -> Path:
    """Writes a random base model whose answers depend on its adapters into `folder / BASE`."""
    torch.manual_seed(0)
    # The CPU kernels of vLLM take heads of 64.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    return folder


def greedy(model) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of the answers to PROMPTS."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, len(prompt) :].tolist()
        scores = [score[0].log_softmax(-1)[token].item() for score, token in zip(output.scores, tokens, strict=True)]
        answers.append((tokens, scores))
    return answers


ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, adapters, settings, prompts, tokens = map(json.loads, sys.argv[1:])
if __name__ == "__main__":
    engine = LLM(
        folder, dtype="float32", enable_lora=True, max_lora_rank=8, max_model_len=128, enforce_eager=True,
        gpu_memory_utilization=0.1, **settings,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    answers = {"has plugin": "cera_train" in sys.modules}
    for number, (name, path) in enumerate(adapters.items(), start=1):
        request = LoRARequest(name, number, path) if path else None
        try:
            if request:
                engine.llm_engine.add_lora(request)
        except Exception as error:
            answers[name] = str(error)
            continue
        outputs = engine.generate(prompts, sampling, lora_request=request)
        answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
    print("ANSWERS", json.dumps(answers))
"""


def run_engine(script: Path, folder: Path, adapters: dict[str, str], plugins: bool = True, **settings) -> dict:
    """The tokens that a vLLM of its own answers to PROMPTS by each adapter (an empty path for the base), or its error.

    Args:
        script: where to write the program.
    """
    script.write_text(ENGINE)
    arguments = map(json.dumps, (str(folder / BASE), adapters, settings, PROMPTS, TOKENS))
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False, timeout=500,
        env=os.environ | SETTINGS | ({} if plugins else {"VLLM_PLUGINS": ""}),
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    assert line, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(line.removeprefix("ANSWERS "))
