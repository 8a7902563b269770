"""Reads what W&B records offline: the rows of metrics, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BLOCK = 32768  # of LevelDB's log format: each record is a header and bytes, and none crosses a block
HEADER = 7  # checksum (4), length (2), kind (1): whole, first, middle or last part


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, in order; the values of a table are under NAME/path, NAME/nrows, ..."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("*.wandb")
    rows = []
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    return rows


def table(folder: Path, path: str) -> list[dict[str, Any]]:
    """The rows of a table, by the path under which the history names it."""
    content = json.loads((folder / "files" / path).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def _records(content: bytes) -> list[bytes]:
    place, parts, records = HEADER, b"", []  # the file begins with a header of W&B's
    while place + HEADER <= len(content):
        if (rest := BLOCK - place % BLOCK) < HEADER:
            place += rest
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records
