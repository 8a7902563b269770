"""`make gpu` without a GPU, and all of it in miniature on a CPU."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import needs_smollm2
from made_files import write_json
from own_imports import failing_imports
from tiny_runs import wait_until

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import work
from benchmarks.gpu.pieces import BY_NAME, PIECES, ROOT, Place
from cera_train.common.files import read_json

BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_from_us_exists(file):
    """Its functions import too, and run for minutes: only a slow test, or no test, calls them."""
    assert not failing_imports(file.read_text())


def test_a_failed_piece_stops_nothing_and_is_retried_last(tmp_path, monkeypatch, capsys):
    ran = []

    def run(piece, place, room):
        ran.append(piece.name)
        has_failed = piece.name == "tests_answers"
        result = (
            {"state": "failed", "reason": "it broke"}
            if has_failed
            else {"state": "passed", "reason": ""}
        )
        write_json(place.result(piece.name), result | {"figures": {"tokens/s": 7.0}})
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
    out = capsys.readouterr().out
    assert "Pieces: 2 passed, 1 failed, 0 skipped." in out
    assert "\n- tests_attention: passed; tokens/s 7\n" in out
    assert "\n- tests_answers: failed; it broke; tokens/s 7\n" in out


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
    work.check_speed(fast, "cuda")
    with pytest.raises(RuntimeError, match=problem):
        work.check_speed(fast | changes, "cuda")


def test_every_test_of_a_gpu_has_a_piece():
    files = {file.stem for file in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")}
    assert files == {
        f"test_gpu_{piece.settings['group']}" for piece in PIECES if piece.work == "run_tests"
    }


def test_a_piece_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SECONDS", 0.2)
    piece = replace(BY_NAME["weights"], expected=0)
    place = Place("cpu", "tiny", tmp_path)
    assert command.run(piece, place, 0.1) is None  # the command had no more time
    result = command.run(piece, place, 0.2)
    assert result["state"] == "failed"
    assert "time limit of 0.2 s" in result["reason"]


def test_a_group_of_tests_that_all_skip_has_not_passed(tmp_path, monkeypatch):
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_gpu_group.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_skips(): pytest.skip('no such "
        "thing')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(work, "ROOT", tmp_path)
    with pytest.raises(work.Skipped, match="1 skipped"):
        work.run_tests(Place("cpu", "tiny", tmp_path), "group")


FIRST = "weights"
MINIATURES = [
    pytest.param(
        ["math_r64_nf4", "race_cera_bfloat16"],
        ["; planned GB ", "; useful TFLOP/s "],
        id="a recipe and the race",
    ),
    pytest.param(
        ["nemo_cera", "nemo_trl", "tests_answers", "decoding"],
        ["; tokens/s of NeMo's LoRA, as published ", "; tests ", "; CeRA, 64 rows, tokens/s "],
        id="the headline, tests and answers",
        marks=pytest.mark.nightly,
    ),
]


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize(("names", "columns"), MINIATURES)
def test_the_whole_command_in_miniature_resumes_after_a_kill(tmp_path, names, columns):
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--size=tiny"]
    arguments += [f"--output={tmp_path}", "--piece", FIRST, *names]
    started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first, second = (tmp_path / "tiny_cpu" / f"{name}.json" for name in (FIRST, names[0]))
    wait_until(lambda: started.poll() is not None or first.exists(), seconds=300, every=0.1)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    stamp = first.stat().st_mtime_ns
    assert not second.exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert first.stat().st_mtime_ns == stamp
    results = [read_json(tmp_path / "tiny_cpu" / f"{name}.json") for name in names]
    assert {result["state"] for result in results} == {"passed"}, done.stdout
    assert done.returncode == 0
    for column in columns:
        assert column in done.stdout
