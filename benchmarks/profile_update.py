"""Where an update's time goes: `python benchmarks/profile_update.py --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

from training import CERA, FIRST_ROWS, PACKAGE, first_rows, lines_of

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        *("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"),
    ),
    "the head's softmax": ("aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::exp_", "aten::exp"),
    "copies and casts": ("aten::copy_", "aten::cat"),
}
"""Kind -> the operations of torch that do it. All others go through memory, element by element, or only prepare."""


def main() -> None:
    import json

    import torch
    from contestants import CONTESTANTS, Setting

    from cera_train.config import ModelConfig
    from cera_train.model import load_tokenizer
    from cera_train.runtime import quiet_libraries

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="jsonl with question and answer, such as GSM8K's; else logistic maps")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--contestant", default=CERA, choices=CONTESTANTS)
    arguments = parser.parse_args()
    quiet_libraries()
    base = load_tokenizer(ModelConfig(path=PACKAGE)).name_or_path
    with first_rows(arguments.rows) as file:
        rows = [json.loads(line) for line in lines_of(file)][:FIRST_ROWS]
        for precision in arguments.precision:
            contestant = CONTESTANTS[arguments.contestant](Setting(base, file, rows, precision, torch.device("cpu")))
            update = list(range(8))
            for _ in range(3):
                contestant.update(update)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                contestant.update(update)
            seconds: Counter[str] = Counter()
            for event in profile.key_averages():
                kind = next((kind for kind, names in KINDS.items() if event.key in names), "element by element")
                seconds[kind] += event.self_cpu_time_total / 1e6
            total = seconds.total()
            print(f"\n{precision}, an update of 8 sequences: {total:.2f} s")
            for kind, taken in seconds.most_common():
                print(f"{kind:<24}{taken:>8.2f} s{taken / total:>8.0%}")


if __name__ == "__main__":
    main()
