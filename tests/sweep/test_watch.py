"""`cera-watch`: a real run followed in a pipe and in a terminal, and how each ends."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess

import pytest
from made_runs import make_run
from watching import WATCH, Terminal, cera_watch, start, terminal

from cera_train.common.files import lock_folder
from cera_train.runs.folder import RunFolder
from cera_train.training.train import train

UPDATES = 12


@pytest.fixture
def at_update(monkeypatch):
    """at_update(3, action): calls it in the midst of the next run, right after the line of this update."""

    def at_update(number: int, action) -> None:
        append = RunFolder.append_metrics

        def append_and_act(folder, line):
            append(folder, line)
            if line["update"] == number and "train/loss" in line:
                action()

        monkeypatch.setattr(RunFolder, "append_metrics", append_and_act)

    return at_update


def test_a_real_run_in_a_pipe_gets_a_line_for_each_update_and_evaluation_to_its_end(tiny_config, tmp_path, at_update):
    folder, watches, first = tmp_path / "outputs" / "run", [], []

    def begin_to_watch() -> None:
        watches.append(start(folder))
        first.extend(watches[0].stdout.readline() for _ in range(3))

    at_update(3, begin_to_watch)
    trained = train(tiny_config(f"train.max_updates={UPDATES}", "train.eval_every=4"))
    rest, errors = watches[0].communicate(timeout=60)
    assert (watches[0].returncode, errors) == (0, "")
    assert first[0] == f"running    {folder}\n"
    assert re.fullmatch(r"update     3/12  loss \d\.\d{3}  perplexity [\d.]+  [\d,]+ tokens/s  0:\d\d left\n", first[1])
    assert first[2].startswith("eval       at update 0: perplexity ")
    *lines, run, update, evaluation = rest.splitlines()
    figures = r"loss [\d.]+  perplexity [\d.]+  [\d,]+ tokens/s  0:\d\d left"
    expected = []
    for number in range(4, UPDATES + 1):
        expected.append(f"update {number:>2}/12  {figures}")
        expected += [rf"evaluation at update {number}: perplexity [\d.]+, effective rank .*"] * (number % 4 == 0)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert run == f"finished   {folder}"
    assert re.match(r"update     12/12  loss [\d.]+", update)
    assert f"at update 12: perplexity {trained['eval/perplexity']:.3f}" in evaluation


@pytest.mark.slow
def test_a_real_run_in_a_terminal_is_drawn_until_it_ends(tiny_config, tmp_path, at_update):
    folder, opened = tmp_path / "outputs" / "run", []

    def begin_to_watch() -> None:
        opened.append(Terminal(*WATCH, str(folder)))
        opened[0].read_to(r"update     7/12")

    at_update(7, begin_to_watch)
    try:
        train(tiny_config(f"train.max_updates={UPDATES}", "train.eval_every=4"))
        opened[0].read_to(None)
        assert opened[0].process.wait(60) == 0
    finally:
        opened[0].close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", opened[0].output)
    assert "running    " in plain
    assert re.search(r"loss +evaluation perplexity\s+[\d.]+│.*[\u2801-\u28ff].*│.*[\u2801-\u28ff]", plain)
    assert "update     12/12" in plain[plain.rindex("finished   ") :]
    assert opened[0].output.rindex("\x1b[?25h") > opened[0].output.rindex("\x1b[?25l")  # the cursor is there again


def test_ctrl_c_ends_it_cleanly_in_a_terminal(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lock = lock_folder(run, "run")
    with terminal(*WATCH, str(run)) as opened:
        opened.read_to("evaluation perplexity")
        os.write(opened._master, b"\x03")
        opened.read_to(None)
        assert opened.process.wait(60) == 130
        assert "Traceback" not in opened.output
        assert opened.output.rindex("\x1b[?25h") > opened.output.rindex("\x1b[?25l")
    lock.release()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly_in_a_pipe(tmp_path, number, status):
    run = make_run(tmp_path / "run", finished=False)
    lock = lock_folder(run, "run")
    watching = start(run)
    assert watching.stdout.readline() == f"running    {run}\n"
    watching.send_signal(number)
    _, errors = watching.communicate(timeout=60)
    assert (watching.returncode, errors) == (status, "")
    lock.release()


def test_a_run_that_was_killed_ends_it(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lock = lock_folder(run, "run")
    watching = start(run)
    assert watching.stdout.readline().startswith("running    ")
    lock.release()  # as a kill does: the lock file stays
    out, errors = watching.communicate(timeout=60)
    assert (watching.returncode, errors) == (0, "")
    assert f"cut        {run}: the same cera-train command goes on with it\n" in out


def test_what_has_ended_is_shown_and_ends_at_once(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", finished=True)
    cera_watch(monkeypatch, run)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"finished   {run}"
    assert len(out) == 3
    cera_watch(monkeypatch, run, "--once")
    once = capsys.readouterr().out.splitlines()
    assert once[:3] == out
    assert once[4].split() == ["loss", "evaluation", "perplexity"]
    assert max(map(len, once)) <= 100
    sample = {"update": 100, "task": None, "prompt": "a" * 300, "answer": "b", "gold": "c", "exact": None}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    cera_watch(monkeypatch, run, "--once")
    assert f"prompt     {'a' * 300}\n" in capsys.readouterr().out  # a pipe has room


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"nothing does not exist \(yet\): expected the folder of a run or of a sweep"),
        (["."], r"\. holds no run: expected the folder of a run or of a sweep"),
        (["run", "--twice"], "unrecognized arguments: --twice .see cera-watch --help"),
        ([], "the following arguments are required: DIR"),
        (["broken"], "result.json is broken: .* Restore it"),
        (["sweep"], "sweep.json is broken: .* Remove it, and start the sweep again"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (make_run(tmp_path / "broken") / "result.json").write_text("{")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"jobs": [')
    with pytest.raises(SystemExit) as exit_info:
        cera_watch(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"cera-watch: .*{message}", line), line


def test_it_starts_in_less_than_half_a_second_of_a_processor(tmp_path):
    run = make_run(tmp_path / "run")

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*WATCH, str(run), "--once"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5
