"""Files of JSON, written and changed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cera_train.common.files import read_json


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def change_json(path: Path, changes: dict[str, Any]) -> None:
    write_json(path, read_json(path) | changes)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
