"""`cera-watch` of a sweep."""

from __future__ import annotations

import re

from made_sweeps import make_job, record_job, record_sweep
from watching import cera_watch

from cera_train.common.files import lock_folder
from cera_train.sweep.watch import WatchedSweep

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
