"""An error of one of several processes keeps its type: a mistake is one line for its user, a bug a traceback."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cera_train.common.errors import UserError
from cera_train.distributed import worker
from cera_train.distributed.launch import ProcessFailed, _as_error
from cera_train.distributed.worker import read_mistake, work


def failure(text: str) -> SimpleNamespace:
    """A process that failed, as torch's launcher reports it."""
    message = {"message": text, "extraInfo": {"py_callstack": "Traceback ..."}}
    return SimpleNamespace(exitcode=1, message=message)


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def in_a_process(monkeypatch, tmp_path):
    """in_a_process(error): runs `work` on a function that raises this error; returns the folder of mistakes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(worker.os, "setpgrp", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)

    def run(error: Exception):
        with pytest.raises(type(error)):
            work(f"{__name__}:fail", error, str(tmp_path))
        return tmp_path

    return run


def test_a_mistake_in_a_process_is_a_mistake_in_its_parent(in_a_process):
    mistakes = in_a_process(UserError("data.prompt: no such column."))
    assert read_mistake(mistakes, 0) is None
    error = _as_error(1, failure("UserError: whatever torch made of it"), mistakes)
    assert type(error) is UserError
    assert str(error) == "data.prompt: no such column."


def test_a_bug_in_a_process_keeps_its_traceback(in_a_process):
    mistakes = in_a_process(ValueError("zip() argument 2 is shorter"))  # a library's or ours, not the user's
    error = _as_error(1, failure("ValueError: zip() argument 2 is shorter"), mistakes)
    assert type(error) is ProcessFailed
    assert "Traceback" in str(error)


def test_a_process_that_lost_another_fails_after_it(in_a_process, monkeypatch):
    """The launcher reports the first failure."""
    pauses = []
    monkeypatch.setattr(worker.time, "sleep", pauses.append)
    in_a_process(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert pauses == [worker.PEER_SECONDS]
