"""`make templates`: reads seven kinds of chat by every original chat template in TRL's wheel, and
writes docs/chat_templates.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.cells import ROOT, YES, table
from benchmarks.tiny_models import byte_tokenizer
from cera_train.common.errors import UserError
from cera_train.data.reader import Reader
from cera_train.settings.data import DataConfig

PAGE = ROOT / "docs" / "chat_templates.md"

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"

TAG = re.compile(r"<[|｜]?[a-zA-Z_▁]+[|｜]?>")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def thinking(message: dict[str, Any], thought: str) -> dict[str, Any]:
    return message | {"reasoning_content": thought}


CALL = {
    "type": "function",
    "id": "a12345678",  # Mistral wants nine characters
    "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
}
CALLING = assistant("", tool_calls=[CALL])
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "a12345678", "content": "sunny"}
SUM = [user("Two plus two?"), assistant("It is four.")]
MORE = [user("And six?"), assistant("It is ten.")]
THOUGHT = [SUM[0], thinking(SUM[1], "Adding two twice.")]
SUNNY = assistant("It is sunny.")

CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": SUM},
    "two turns": {"messages": [*SUM, *MORE]},
    "system": {"messages": [{"role": "system", "content": "Be kind."}, *SUM]},
    "reasoning": {"messages": THOUGHT},
    "reasoning twice": {"messages": [*THOUGHT, MORE[0], thinking(MORE[1], "Four and six.")]},
    "tool": {"messages": [user("Weather in Rome?"), CALLING, RESULT, SUNNY], "tools": [TOOL]},
    "tool, reasoning": {
        "messages": [
            user("Weather in Rome?"),
            thinking(CALLING, "I need the tool."),
            RESULT,
            thinking(SUNNY, "It said sunny."),
        ],
        "tools": [TOOL],
    },
}


def originals(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by their names, without those that TRL changed to train."""
    files = sorted(folder.glob("*.jinja"))
    return {file.stem: file.read_text() for file in files if not file.stem.endswith("_training")}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes to which the template's tags are special tokens."""
    tags = sorted({*TAG.findall(template)} - {"<s>", "</s>"})
    return byte_tokenizer(
        "<s>", *tags, bos_token="<s>", extra_special_tokens=tags, chat_template=template
    )


def cell_of(row: dict[str, Any], tokenizer: Any) -> str:
    """What becomes of a chat, in few words."""
    config = DataConfig(layout="messages", train_files=["chats.jsonl"], eval_rows=1)
    try:
        sequences = Reader(config, tokenizer).sequences(row)
    except UserError as error:
        return next(short for part, short in REFUSALS.items() if part in str(error))
    openings = {
        f"{name}={json.dumps(value)}"
        for exchanges in sequences
        for name, value in exchanges[0].opening.items()
    }
    notes = [f"{len(sequences)} sequences"] if len(sequences) > 1 else []
    return re.sub(r'"(.+?)"', r"`\1`", ", ".join([*notes, *sorted(openings)]) or YES)


REFUSALS = {
    "the reasoning of": "no reasoning",
    "column 'tools'": "no tools",
    "role 'assistant', is left out": "no calls",
    "System role": "no system",
    "alternate": "no tools",
    "roles are supported": "no tools",
    "Unexpected role": "no tools",
    "no answer": "no calls",
}
"""A part of a refusal, and the cell."""


def page(templates: dict[str, str]) -> str:
    rows = {}
    for name, template in templates.items():
        tokenizer = tokenizer_with(template)
        rows[name] = [cell_of(row, tokenizer) for row in CHATS.values()]
    cells = [cell for row in rows.values() for cell in row]
    refused = sum(cell in REFUSALS.values() for cell in cells)
    return f"""# Chat templates

    cera-train 'data.train_files=[chats.jsonl]' model.path=Qwen/Qwen3-8B name=chats --look

shows how chats are read. What an answer [adds to the prompt of inference](data.md#chats) is
supervised. `make templates` reads seven kinds of chat by the {len(templates)} original templates in
TRL {version("trl")}, and writes this page:

| template | {" | ".join(CHATS)} |
{"|---" * (len(CHATS) + 1)}|
{table(rows)}

{len(cells) - refused} of {len(cells)} are read; in the others the template has no place for a part.

- **N sequences**: the template rewrites earlier turns, such as without their reasoning. Each answer
  then has a sequence of its own.
- **enable_thinking=...**: answers follow this generation prompt.
- **without=...**: the answer follows the generation prompt without the reasoning that it opens.
"""


def main() -> None:
    PAGE.write_text(page(originals(TRL)))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
