"""A run that is still written to: every whole line once, whatever else lies there, and nothing is touched."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
from made_runs import make_run

import cera_train.runs.following as following
from cera_train.common.errors import UserError
from cera_train.common.files import is_locked, lock_folder, write_bytes
from cera_train.runs.following import FollowedRun, GrowingFile
from cera_train.runs.results import EvaluationMetrics, Sample, UpdateMetrics


def update(number: int, **values: object) -> bytes:
    line = {"update": number, "train/loss": 2.0 / number, "train/seconds": 3.0 * number}
    return json.dumps(line | values).encode() + b"\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that has begun, without a line yet."""
    (tmp_path / "config.yaml").write_text("train: {}")
    (tmp_path / "environment.json").write_text('{"updates": 20}')
    return tmp_path


def append(folder: Path, content: bytes, name: str = "metrics.jsonl") -> None:
    with (folder / name).open("ab") as file:
        file.write(content)


def test_half_a_line_is_read_when_it_is_whole(folder):
    run = FollowedRun(folder)
    assert run.look() == []
    line = update(2)
    append(folder, update(1) + line[:10])
    assert [new.update for new in run.look()] == [1]
    append(folder, line[10:-1])
    assert run.look() == []
    append(folder, b"\n")
    assert [new.update for new in run.look()] == [2]
    assert (run.update, run.total, run.broken) == (2, 20, 0)


def test_what_comes_after_a_resumed_runs_checkpoint_is_new(folder):
    """Resuming replaces the file by its lines up to the checkpoint; another writer may cut it, or remove it."""
    run = FollowedRun(folder)
    append(folder, b"".join(map(update, range(1, 6))))
    run.look()
    write_bytes(folder / "metrics.jsonl", b"".join(map(update, range(1, 4))))
    assert run.look() == []
    assert run.update == 3
    append(folder, update(4, **{"train/loss": 9.0}))
    assert [(new.update, new.loss) for new in run.look()] == [(4, 9.0)]
    os.truncate(folder / "metrics.jsonl", len(update(1)))
    assert run.look() == []
    assert [line.update for line in run.updates] == [1]
    (folder / "metrics.jsonl").unlink()
    assert run.look() == []
    assert run.updates == []
    append(folder, update(7))
    assert [new.update for new in run.look()] == [7]


@pytest.mark.parametrize("content", [b"c\nd\n", b"c\nd\ne\n", b"c\nb and more\n", b"a\n\xff\n"])
def test_another_file_of_the_same_name_is_read_from_its_start(tmp_path, content):
    """Also one that is longer, and has the number of the old one, as a file system may give it."""
    path = tmp_path / "lines"
    path.write_bytes(b"a\nb\n")
    file = GrowingFile(path)
    assert file.read() == (False, [b"a\n", b"b\n"])
    assert file.read() == (False, [])
    path.write_bytes(content)
    assert file.read() == (True, content.splitlines(keepends=True))


HOSTILE = [
    *(b"", b"{", b"[]", b"null", b'"update"', b"\xff\xfe\x00", b"{}", b'{"update": "7"}', b'{"update": true}'),
    *(b'{"update": -1}', b'{"update": 1e3}', b'{"update": 1' + b"0" * 400 + b"}", b'{"update": 1' + b"0" * 9000 + b"}"),
    *(b'{"update": 3, "train/loss": "low"}', b'{"update": 3, "eval/perplexity": []}', b"[" * 100_000),
]
ODD = [
    b'{"update": 3}',
    b'{"update": 3, "train/loss": null, "unknown": {"a": [1]}}',
    b'{"update": 3, "train/loss": Infinity, "train/seconds": NaN, "train/tokens_per_s": 1e308}',
    b'{"update": 3, "train/seconds": -Infinity}',
    b'{"update": 3, "eval/perplexity": 1e300, "spectrum/effective_rank/mean": NaN}',
]


def test_lines_that_cannot_be_read_are_counted_and_left_out(folder):
    run = FollowedRun(folder)
    append(folder, update(1) + b"\n".join(HOSTILE) + b"\n" + update(2) + b"\n".join(ODD) + b"\n")
    assert [line.update for line in run.look()] == [1, 2, *[3] * len(ODD)]
    assert run.broken == len(HOSTILE)
    assert len(run.evaluations) == 1
    assert run.best.perplexity == 1e300
    assert run.seconds_left() is None or math.isfinite(run.seconds_left())


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_what_is_no_file_is_not_opened(folder, name):
    """A pipe would be waited for."""
    append(folder, update(1))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    FollowedRun(folder).look()


def test_samples_are_those_of_the_last_evaluation(folder):
    run = FollowedRun(folder)
    rows = [
        {"update": at, "prompt": "a?", "answer": "b", "gold": "c", "task": None, "exact": False}
        for at in (0, 0, 5, 5, 5)
    ]
    append(folder, b"".join(json.dumps(row).encode() + b"\n" for row in rows), "samples.jsonl")
    assert [type(new) for new in run.look()] == [Sample] * 5
    assert [sample.update for sample in run.samples] == [5, 5, 5]


def test_a_state_follows_from_the_folder_and_looking_changes_nothing(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(UserError, match=r"run does not exist \(yet\): expected the folder of a run or of a sweep"):
        FollowedRun(path).look()
    path.mkdir()
    with pytest.raises(UserError, match="run holds no run"):
        FollowedRun(path).look()
    lock = lock_folder(path, "run")
    run = FollowedRun(path)
    run.look()
    assert run.state == "running"
    lock.release()  # as a process that was killed: the file stays
    make_run(tmp_path / "other", finished=False)
    for file in (tmp_path / "other").iterdir():
        file.rename(path / file.name)
    before = [(entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(path)]
    was = path.stat().st_mtime_ns
    run.look()
    assert run.state == "cut"
    assert (path / ".lock").exists()
    assert before == [(entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(path)]
    (path / ".lock").unlink()
    run.look()
    assert (run.state, path.stat().st_mtime_ns > was, (path / ".lock").exists()) == ("cut", True, False)
    (path / "result.json").write_text('{"eval/perplexity": 2.0}')
    run.look()
    assert (run.state, run.result.perplexity) == ("finished", 2.0)


def test_a_look_at_the_lock_holds_up_no_run(tmp_path, monkeypatch):
    """The shared lock of a look, held far longer than an instant."""
    import fcntl
    import threading

    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not is_locked(tmp_path)  # nor does another look count as a run
        timer = threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        lock = lock_folder(tmp_path, "run")
        timer.join()
    assert is_locked(tmp_path)
    lock.release()


def test_the_pace_is_the_observed_one_where_there_is_one(folder, monkeypatch):
    """Ten seconds an update, as seen, though the run measured three in the update itself: it evaluates between."""
    now = 0.0
    monkeypatch.setattr(following.time, "monotonic", lambda: now)
    run = FollowedRun(folder)
    append(folder, b"".join(map(update, range(1, 5))))
    run.look()
    assert run.seconds_left() == 16 * 3.0
    for number in (5, 6):
        now += 10
        append(folder, update(number))
        run.look()
    assert run.seconds_left() == 14 * 10.0
    assert run.seconds_left(update=19) == 10.0
    write_bytes(folder / "metrics.jsonl", update(1) + update(2))  # resumed, perhaps elsewhere
    run.look()
    assert run.seconds_left() == 18 * 3.0


def test_a_long_run_is_followed_at_once(folder):
    append(folder, b"".join(map(update, range(1, 50_001))))
    run = FollowedRun(folder)
    run.look()
    started = time.process_time()
    for number in range(50_001, 50_011):
        append(folder, update(number))
        assert [new.update for new in run.look()] == [number]
    assert time.process_time() - started < 0.5
    assert isinstance(run.updates[-1], UpdateMetrics)
    assert not any(isinstance(line, EvaluationMetrics) for line in run.updates)
