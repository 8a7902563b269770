"""Reads what W&B recorded offline: the parts of a run, as `wandb sync` would upload them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
"""Bytes of a block of the file and of the header before it and before each piece of a record (LevelDB's log format)."""


@dataclass
class OfflineRun:
    """All parts of one run, in the order in which they were recorded."""

    ids: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    job_types: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Logged values; W&B's names, which start with _, are left out."""
    summary: dict[str, Any] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def file(self, media: dict[str, Any]) -> Path:
        """The file that a logged picture, page or table stands for."""
        return next(path for folder in self.folders if (path := folder / "files" / media["path"]).is_file())


def read_offline_run(run: Path) -> OfflineRun:
    """What W&B recorded in a run's folder."""
    from wandb.proto import wandb_internal_pb2

    read = OfflineRun()
    for folder in sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime):
        read.folders.append(folder)
        (path,) = folder.glob("*.wandb")
        for content in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                read.ids.add(record.run.run_id)
                read.names.add(record.run.display_name)
                read.groups.add(record.run.run_group)
                read.job_types.add(record.run.job_type)
                read.config |= values(record.run.config.update)
            elif kind == "history":
                read.rows.append(values(record.history.item))
            elif kind == "summary":
                read.summary |= values(record.summary.update)
    return read


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of one part, in order; the values of a table are under NAME/path, NAME/nrows, ..."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    read = map(Record.FromString, records(path.read_bytes()))
    return [values(record.history.item) for record in read if record.HasField("history")]


def table(folder: Path, path: str) -> list[dict[str, Any]]:
    """The rows of a table, by the path under which the history names it."""
    content = json.loads((folder / "files" / path).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def values(items: Any) -> dict[str, Any]:
    """Names and values of a record."""
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {name: value for name, value in named.items() if not name.startswith("_")}


def records(content: bytes) -> list[bytes]:
    """The records of a .wandb file. A long one lies in several pieces, of which types 1 and 4 are the last."""
    found, pieces, place = [], b"", HEADER
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # no header fits into the rest of a block
            place += BLOCK - place % BLOCK
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):
            found.append(pieces)
            pieces = b""
    return found
