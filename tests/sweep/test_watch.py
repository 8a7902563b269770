"""`cera-watch`: a real run followed in a pipe and in a terminal, a sweep, and how each ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import make_run
from made_sweeps import make_job, record_job, record_sweep
from rich.cells import cell_len

from cera_train.cli.watch import main
from cera_train.common.files import lock_folder
from cera_train.runs.folder import RunFolder
from cera_train.sweep.watch import WatchedRun, WatchedSweep
from cera_train.training.train import train

WATCH = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'cera-watch'\nfrom cera_train.cli.watch import main; main()",
]
UPDATES = 12


def cera_watch(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cera-watch", *map(str, arguments)])
    main()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*WATCH, str(folder), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


class Terminal:
    """A command in a terminal of its own, of 100 columns and 30 rows."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(command, **streams, env=environment, preexec_fn=self._own)
        os.close(slave)
        self.output = ""

    @staticmethod
    def _own() -> None:
        """Makes the terminal the command's, so that Ctrl-C in it is a signal."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read_to(self, pattern: str | None) -> None:
        """Reads until a pattern has come; None: until the command has ended."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if pattern is not None and re.search(pattern, self.output):
                return
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the last one has closed it
                    return
        raise AssertionError(self.output[-2000:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    opened = Terminal(*command)
    try:
        yield opened
    finally:
        opened.close()


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


# --- a real run ------------------------------------------------------------------------------------------------------


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


# --- how it ends -----------------------------------------------------------------------------------------------------


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


# --- what a picture holds --------------------------------------------------------------------------------------------


@pytest.fixture
def hostile_run(tmp_path) -> Path:
    """A run whose texts steer a terminal, whose lines are broken, and whose figures are no numbers."""
    run = make_run(tmp_path / "run", finished=False)
    (run / "environment.json").write_text('{"updates": 100}')
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"update": 51, "train/loss": Infinity, "train/tokens_per_s": NaN}\n{"update": 52, "tr')
    sample = {"prompt": "What\nis \x1b]0;title\x07 \u202e 7?", "answer": "字" * 300, "gold": "7", "task": "sums"}
    rows = [sample | {"update": update, "exact": grade} for update, grade in ((0, True), (40, False), (40, None))]
    rows += [sample | {"update": 40, "exact": [1]}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"update": 41}x\n')
    return run


@pytest.mark.parametrize("width", [1, 9, 30, 79, 80, 200])
@pytest.mark.parametrize("height", [None, 1, 5, 24, 60])
def test_a_picture_keeps_to_the_terminal_and_steers_nothing(hostile_run, width, height):
    watched = WatchedRun(hostile_run)
    watched.look()
    picture = watched.picture(width, height)
    assert height is None or len(picture) <= height
    for line in picture:
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", line.plain)
        assert cell_len(line.plain) <= width


def test_a_picture_shows_samples_grades_and_how_many_lines_are_broken(hostile_run):
    watched = WatchedRun(hostile_run)
    watched.look()
    lines = [line.plain for line in watched.picture(60)]
    assert "note       4 lines of metrics.jsonl or samples.jsonl cannot be read" in " ".join(watched.lines())
    start = lines.index("samples at update 40")
    assert lines[start + 1] == "prompt     What is \ufffd]0;title\ufffd \ufffd 7?"
    assert lines[start + 2].startswith("  wrong    字字")
    assert lines[start + 3] == "  gold     7"
    assert lines[start + 5].startswith("  ungraded 字字")
    assert len(lines) == start + 7


def test_samples_of_an_evaluation_are_lines_in_a_pipe(hostile_run):
    watched = WatchedRun(hostile_run)
    line = list(watched.look())[-2]
    assert line.startswith("sample at update 40: What is \x1b]0;title\x07 \u202e 7? -> 字")
    assert line.endswith("字 (wrong, gold 7)")


def test_figures_of_tasks_stand_beside_those_of_the_evaluation(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lines = [{"update": 60, "eval/perplexity": 2.5, "gsm8k/exact": 0.25}, {"update": 80, "eval/perplexity": 2.0}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    watched = WatchedRun(run)
    line = list(watched.look())[-2]
    assert line == "evaluation at update 60: perplexity 2.500; gsm8k exact 25.0%"
    assert watched.lines()[-1] == "tasks      at update 60: gsm8k exact 25.0%"


def test_figures_that_are_no_numbers_draw_nothing(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    lines = [{"update": n, name: math.inf} for n in range(3) for name in ("train/loss", "eval/perplexity")]
    lines += [{"update": n, "eval/perplexity": 2.0 + n} for n in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watched = WatchedRun(run)
    watched.look()
    assert watched.lines()[1] == "update     2  loss inf"
    assert any("│" in line.plain for line in watched.picture(100))


# --- a sweep ---------------------------------------------------------------------------------------------------------

NAMES = [f"adapter.r={r}" for r in (2, 4, 8)]


def test_a_sweep_gets_a_line_for_each_change_and_ends_when_every_job_has(tmp_path):
    record_sweep(tmp_path, *NAMES)
    make_job(tmp_path, NAMES[0], 2.5)
    watched = WatchedSweep(tmp_path)
    assert watched.look() == ["adapter.r=2  finished           20/20        2.500  best"]
    assert not watched.is_over
    folder = make_job(tmp_path, NAMES[1])
    lock = lock_folder(folder, "run")
    assert watched.look() == ["adapter.r=4  running             5/20        9.000"]
    assert watched.look() == []
    with (folder / "metrics.jsonl").open("a") as file:  # the end of half a line first
        file.write('ain/loss": 1}\n{"update": 7, "train/loss": 1}\n')
    assert watched.look() == []  # updates show in the table
    assert "5/20" not in watched.lines()[4]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 10, "eval/perplexity": 3.0}\n[]\n{"update": "x", "eval/perplexity": 1}\n')
    assert watched.look() == ["adapter.r=4  running            10/20        3.000"]
    lock.release()
    assert watched.look() == ["adapter.r=4  cut                10/20        3.000"]
    assert not watched.is_over
    (folder / "result.json").write_text('{"updates": 20, "eval/perplexity": 2.0}')
    record_job(tmp_path, NAMES[2], "data.path=x: no such file")
    assert watched.look() == [
        "adapter.r=4  finished           20/20        2.000  best",
        "adapter.r=8  failed                                 data.path=x: no such file",
    ]
    assert watched.is_over
    assert watched.lines()[-2:] == [
        f"best       {tmp_path / NAMES[1]}: perplexity 2.000",
        f"errors     in full in {tmp_path / '.jobs'}; the same command tries these jobs again",
    ]


def test_a_sweep_in_a_pipe_ends_with_its_table(tmp_path, monkeypatch, capsys):
    record_sweep(tmp_path, *NAMES[:2])
    make_job(tmp_path, NAMES[0], 2.5)
    monkeypatch.setattr("cera_train.sweep.watch.PAUSE", 0.0)
    looks = []
    look = WatchedSweep.look

    def finish_at_the_third(watched: WatchedSweep) -> list[str]:
        looks.append(None)
        if len(looks) == 3:
            make_job(tmp_path, NAMES[1], 1.5)
        return look(watched)

    monkeypatch.setattr(WatchedSweep, "look", finish_at_the_third)
    cera_watch(monkeypatch, tmp_path)
    before, after = capsys.readouterr().out.split("adapter.r=4  finished           20/20        1.500  best\n", 1)
    assert "jobs       1 finished, 1 waiting" in before
    assert "adapter.r=4  finished           20/20        1.500  best" in after


def test_a_sweeper_that_decides_as_it_goes_may_always_have_another_job(tmp_path):
    record_sweep(tmp_path)
    make_job(tmp_path, "optimizer.lr=0.1", 2.0)
    record_job(tmp_path, "optimizer.lr=0.1", None)
    watched = WatchedSweep(tmp_path)
    watched.look()
    assert not watched.is_over


def test_a_long_table_is_cut_to_the_terminal_and_keeps_what_runs(tmp_path):
    names = [f"adapter.r={r}" for r in range(2, 42)]
    record_sweep(tmp_path, *names)
    for name in names[:20]:
        make_job(tmp_path, name, 2.0)
    lock = lock_folder(make_job(tmp_path, names[30]), "run")
    watched = WatchedSweep(tmp_path)
    watched.look()
    picture = [line.plain for line in watched.picture(100, 20)]
    assert len(picture) <= 20
    assert any(re.match(r"adapter.r=32 +running", line) for line in picture)
    assert any(re.fullmatch(r"\.\.\. and \d+ more", line) for line in picture)
    assert "best" in picture[-1]
    lock.release()
    assert len(watched.picture(100)) == 3 + 40 + 3
