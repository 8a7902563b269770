"""Rows of both splits as a config, and a cache for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples import EVALUATION, QUESTION_AND_ANSWER, TRAIN

from cera_train.data import files
from cera_train.settings.data import DataConfig


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """The folder of tokenised rows of an empty cache."""
    monkeypatch.setenv("CERA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def config_of(write_jsonl):
    """config_of(train rows, evaluation rows, **settings) -> DataConfig"""

    def config_of(train: list = TRAIN, evaluation: list = EVALUATION, **settings) -> DataConfig:
        names = {
            "train_files": [str(write_jsonl("train.jsonl", train))],
            "eval_files": [str(write_jsonl("eval.jsonl", evaluation))] if evaluation else [],
        }
        return DataConfig(**(QUESTION_AND_ANSWER | names | settings))

    return config_of


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files whose rows were read, in order."""
    names: list[str] = []
    read = files.READERS[".jsonl"]
    monkeypatch.setitem(files.READERS, ".jsonl", lambda path: names.append(Path(path).name) or read(path))
    return names
