"""Where an update's time goes: `python -m benchmarks.profile_update --help`."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS, RANK, Setting
from benchmarks.training import CERA, PACKAGE, WITHOUT_GPUS, Work, first_rows, lines_of, matmul_peak

MICRO_BATCH = 1024
"""Tokens of the products that the peak is looked for among."""

KINDS = {
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        *("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"),
    ),
    "the head's softmax": ("aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::exp_", "aten::exp"),
    "copies and casts": ("aten::copy_", "aten::cat"),
}
"""Kind -> the operations of torch that do it. But for matrix products, which are told apart by their shapes, all others
go through memory, element by element, or only prepare."""


def product(event: Any, vocabulary: int) -> tuple[str, int] | None:
    """Whose matrix product an operation is, and its multiplies and adds."""
    if event.key not in ("aten::mm", "aten::addmm_"):
        return None
    left, right = event.input_shapes[:2] if event.key == "aten::mm" else event.input_shapes[1:3]
    sizes = {*left, *right}
    whose = "adapter" if RANK in sizes else "head" if vocabulary in sizes else "layers"
    return f"products of the {whose}", 2 * left[0] * left[1] * right[1] * event.count


def main() -> None:
    os.environ |= WITHOUT_GPUS
    import torch
    from transformers import AutoConfig

    from cera_train.distributed.accelerator import quiet_libraries
    from cera_train.model.weights import load_tokenizer
    from cera_train.settings.model import ModelConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="jsonl with question and answer, such as GSM8K's; else logistic maps")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--contestant", default=CERA, choices=CONTESTANTS)
    arguments = parser.parse_args()
    quiet_libraries()
    base = load_tokenizer(ModelConfig(path=PACKAGE)).name_or_path
    config = AutoConfig.from_pretrained(base)
    with first_rows(arguments.rows) as file:
        rows = [json.loads(line) for line in lines_of(file)]
        for precision in arguments.precision:
            contestant = CONTESTANTS[arguments.contestant](Setting(base, file, rows, precision, torch.device("cpu")))
            update = list(range(8))
            for _ in range(3):
                contestant.update(update)
            with torch.profiler.profile(record_shapes=True) as profile:
                contestant.update(update)
            seconds: Counter[str] = Counter()
            flops: Counter[str] = Counter()
            for event in profile.key_averages(group_by_input_shape=True):
                kind = next((kind for kind, names in KINDS.items() if event.key in names), "element by element")
                if whose := product(event, config.vocab_size):
                    kind = whose[0]
                    flops[kind] += whose[1]
                seconds[kind] += event.self_cpu_time_total / 1e6
            total = seconds.total()
            peak = matmul_peak(Work(precision, 8), config, MICRO_BATCH)
            print(f"\n{precision}, an update of 8 sequences: {total:.2f} s; peak {peak / 1e9:,.0f} GFLOP/s")
            for kind, taken in seconds.most_common():
                speed = f"{flops[kind] / taken / 1e9:>8,.0f} GFLOP/s" if kind in flops else ""
                print(f"{kind:<24}{taken:>8.2f} s{taken / total:>8.0%}{speed}")


if __name__ == "__main__":
    main()
