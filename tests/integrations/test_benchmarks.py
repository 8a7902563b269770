"""`make gpu` without a GPU, and all of it in miniature on a CPU; the other benchmarks find what
they measure."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import needs_smollm2
from own_imports import failing_imports
from tiny_runs import wait_until

from benchmarks import data, startup
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pieces, runs
from benchmarks.gpu.pieces import all_pieces
from benchmarks.gpu.place import Place, Skipped

ROOT = Path(command.__file__).parents[2]
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_from_us_exists(file):
    """Its functions import too, and run for minutes: only a slow test, or no test, calls them."""
    assert not failing_imports(file.read_text())


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command, "gpus", lambda: "")
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("no CUDA GPU here: ")


def test_a_failed_piece_stops_nothing_and_is_retried_last(tmp_path, monkeypatch, capsys):
    ran = []

    def run(piece, place, seconds):
        ran.append(piece.name)
        state = command.FAILED if piece.name == "tests_answers" else command.PASSED
        place.folder.mkdir(parents=True, exist_ok=True)
        command.write_result(
            place,
            piece.name,
            state,
            "it broke" if state == command.FAILED else "",
            {"tokens/s": 7.0},
        )
        return command.read_result(place, piece.name)

    monkeypatch.setattr(command, "run", run)
    arguments = [
        "--device=cpu",
        f"--output={tmp_path}",
        "--piece",
        "tests_answers",
        "tests_attention",
    ]
    assert command.main(arguments) == 1
    assert ran == ["tests_answers", "tests_attention"]
    assert command.main([*arguments, "nemo_cera"]) == 1
    assert ran[2:] == ["nemo_cera", "tests_answers"]
    capsys.readouterr()
    command.main([*arguments, "--report"])
    out = capsys.readouterr().out
    assert "Pieces: 1 passed, 1 failed, 0 skipped." in out
    assert "\n| tests_attention | 7 |\n" in out
    assert out.endswith("\n- tests_answers: failed: it broke\n")
    assert len(ran) == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fallbacks": ["varlen attention: TypeError"]}, "it fell back: varlen attention"),
        ({"attention": "sdpa"}, "attention was sdpa, not varlen"),
        ({"compiled_graphs": 0}, "no graph was compiled"),
    ],
)
def test_a_run_that_took_a_slower_way_fails_its_piece(changes, problem):
    fast = {"fallbacks": [], "attention": "varlen", "compiled_graphs": 7}
    runs.check_speed(fast, "cuda", compiles=True)
    with pytest.raises(RuntimeError, match=problem):
        runs.check_speed(fast | changes, "cuda", compiles=True)


def test_the_headline_runs_in_the_first_ten_minutes():
    names = [*all_pieces()]
    headline = names[: names.index("nemo_trl") + 1]
    assert {"nemo_cera", "nemo_lora"} < {*headline}
    assert sum(all_pieces()[name].expected for name in headline) <= 600


def test_every_piece_fits_into_ten_minutes_and_every_test_file_has_a_piece():
    assert all(0 < piece.expected < piece.seconds <= 540 for piece in all_pieces().values())
    files = (ROOT / "tests" / "gpu").glob("test_gpu_*.py")
    assert set(pieces.TESTS) == {file.stem.removeprefix("test_gpu_") for file in files}


def test_a_piece_that_takes_too_long_is_ended(tmp_path):
    piece = replace(all_pieces()["weights"], seconds=0.2)
    place = Place("cpu", "tiny", tmp_path)
    assert command.run(piece, place, 0.1) is None  # the command had no more time
    result = command.run(piece, place, 0.2)
    assert result["state"] == command.FAILED
    assert "time limit of 0.2 s" in result["reason"]


def test_a_group_of_tests_that_all_skip_has_not_passed(tmp_path, monkeypatch):
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_gpu_group.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_skips(): pytest.skip('no such "
        "thing')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(pieces, "ROOT", tmp_path)
    with pytest.raises(Skipped, match="1 skipped"):
        pieces.run_tests(Place("cpu", "tiny", tmp_path), "group")


FIRST = "weights"
MINIATURES = [
    pytest.param(
        ["math_r64_nf4", "race_cera_bfloat16"],
        ["| planned GB |", "| useful TFLOP/s |"],
        id="a recipe and the race",
    ),
    pytest.param(
        ["machine", "nemo_cera", "nemo_trl", "profile", "tests_answers", "grpo_samples"],
        ["| GB/s of copies |", "| attention, eager |", "| tests |", "| rows of a batch |"],
        id="the headline, tests and samples",
        marks=pytest.mark.nightly,
    ),
]


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize(("names", "columns"), MINIATURES)
def test_the_whole_command_in_miniature_resumes_after_a_kill(tmp_path, names, columns):
    command_line = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device=cpu",
        "--size=tiny",
        f"--output={tmp_path}",
    ]
    arguments = [*command_line, "--piece", FIRST, *names]
    started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first, second = (tmp_path / "tiny_cpu" / f"{name}.json" for name in (FIRST, names[0]))
    wait_until(lambda: started.poll() is not None or first.exists(), seconds=300, every=0.1)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    stamp = first.stat().st_mtime_ns
    assert not second.exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert first.stat().st_mtime_ns == stamp
    results = [json.loads((tmp_path / "tiny_cpu" / f"{name}.json").read_text()) for name in names]
    assert {result["state"] for result in results} == {"passed"}, done.stdout
    assert done.returncode == 0
    for column in columns:
        assert column in done.stdout


@needs_smollm2
def test_the_data_benchmark_leaves_the_environment_unchanged():
    before = dict(os.environ)
    _, figures = data.measure(rows=200)
    assert figures["rows"] == 200
    assert dict(os.environ) == before


@needs_smollm2
@pytest.mark.nightly
def test_the_startup_benchmark_finds_every_line_that_it_waits_for():
    targets, _ = startup.measure(rounds=1)
    assert [target.name for target in targets] == list(startup.AT_MOST)
