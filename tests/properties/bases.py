"""Tiny bases and rows of every kind, in the folder where the commands run."""

import copy
import json
from pathlib import Path

from conftest import CHAT_TEMPLATE, make_tiny_llama
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny_models import tiny_model

CALLS = (
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}"
)


def chat(number: int) -> list[dict]:
    return [
        {"role": "user", "content": f"Say {number}."},
        {"role": "assistant", "content": f"It is {number}."},
    ]


def call(number: int) -> list[dict]:
    function = {"name": "add", "arguments": {"one": number}}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    calling["tool_calls"][0]["function"] = function
    return [chat(number)[0], calling, {"role": "tool", "content": "8"}, chat(number)[1]]


ROWS = {
    "columns": lambda number: {
        "prompt": f"Say {number}, once and for all:",
        "completion": f" it is {number}, and again it is {number}",
    },
    "chats": lambda number: {"messages": chat(number)},
    "tools": lambda number: {"messages": call(number)},
    "texts": lambda number: {"text": f"One, two, {number}, and so on, and on."},
    "preferences": lambda number: {
        "prompt": f"Say {number}:",
        "chosen": f" it is {number}",
        "rejected": f" no, {number}",
    },
}


def write_bases(place: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes bases by their names, NAME.jsonl of 46 rows, and a data set that can be streamed."""
    template = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}" + CALLS)
    assert template != CHAT_TEMPLATE
    calling = copy.deepcopy(tokenizer)
    calling.chat_template = template
    bases = {
        "llama": make_tiny_llama(len(tokenizer)),
        "tied": make_tiny_llama(len(tokenizer), tie_word_embeddings=True),
        "moe": tiny_model("qwen3_moe", vocab_size=len(tokenizer)),
        "mamba": tiny_model("mamba", vocab_size=len(tokenizer)),
    }
    for name, base in bases.items():
        base.save_pretrained(place / name)
        calling.save_pretrained(place / name)
    (place / "hub").mkdir()
    for name, row_of in ROWS.items():
        lines = [json.dumps(row_of(number)) + "\n" for number in range(46)]
        (place / f"{name}.jsonl").write_text("".join(lines))
        if name == "columns":
            (place / "hub" / "train.jsonl").write_text("".join(lines[:40]))
            (place / "hub" / "test.jsonl").write_text("".join(lines[40:]))
