"""`make gpu`: what it prints without a GPU, and the whole of it in miniature on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import needs_smollm2

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import machine, runs, testing
from benchmarks.gpu.pieces import all_pieces
from benchmarks.gpu.place import Place
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Found, Result, code_version

ROOT = Path(command.__file__).parents[2]
HERE = {"gpus": [], "memory": [], "capability": [], "driver": None, "cuda": None, "python": "3", "packages": {}}
GPU = HERE | {"gpus": ["NVIDIA H100 80GB HBM3"], "memory": [80e9], "capability": ["9.0"], "driver": "580", "cuda": "13"}


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(machine, "ask", lambda: HERE)


@pytest.fixture
def ran(monkeypatch, no_gpu) -> list[str]:
    """The pieces that the command runs, without running them."""
    names = []

    def run(piece, place, identity, seconds):
        names.append(piece.name)
        state = FAILED if piece.name == "tests_answers" else PASSED
        return Result(piece.name, Found(state, "it broke" if state == FAILED else ""), 1.0, identity)

    monkeypatch.setattr(command, "run", run)
    return names


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_prints_a_line_and_proves_what_can_be_proven(no_gpu, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda arguments, cwd: called.append(arguments) or 5)
    assert command.main([]) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CUDA GPU here: on one, this runs ")
    assert called == [[sys.executable, *command.PROVABLE]]


def test_a_piece_with_a_result_is_not_run_again_unless_the_code_is_another(ran, tmp_path, monkeypatch, capsys):
    arguments = ["--device=cpu", "--size=tiny", f"--output={tmp_path}", "--piece", "tests_attention", "nemo_lora"]
    assert command.main(arguments) == 0
    assert command.main(arguments) == 0
    assert ran == ["tests_attention", "nemo_lora"]
    monkeypatch.setattr(
        command, "code_version", lambda folders: "other" if "tests" in folders else code_version(folders)
    )
    command.main([*arguments, "--keep"])
    assert ran == ["tests_attention", "nemo_lora"]
    command.main(arguments)
    assert ran == ["tests_attention", "nemo_lora", "tests_attention"]
    capsys.readouterr()
    command.main([*arguments, "--report"])
    assert "Pieces: 2 passed, 0 failed" in capsys.readouterr().out
    assert len(ran) == 3


def test_a_failure_stops_no_other_piece_and_is_tried_again_after_them(ran, tmp_path, capsys):
    arguments = ["--device=cpu", f"--output={tmp_path}", "--piece", "tests_answers", "tests_attention"]
    assert command.main(arguments) == 1
    assert ran == ["tests_answers", "tests_attention"]
    assert "- tests_answers: failed: it broke" in capsys.readouterr().out
    assert command.main([*arguments, "nemo_cera"]) == 1
    assert ran[2:] == ["nemo_cera", "tests_answers"]


def test_every_piece_fits_into_ten_minutes():
    pieces = all_pieces()
    assert all(0 < piece.expected < piece.seconds <= 540 for piece in pieces.values())
    assert {name.removeprefix("tests_") for name in pieces if name.startswith("tests_")} == {
        path.stem.removeprefix("test_gpu_") for path in (ROOT / "tests" / "gpu").glob("*.py")
    }


# --- a piece's process -----------------------------------------------------------------------------------------------


def test_a_piece_that_takes_too_long_is_ended(tmp_path):
    piece, place = replace(all_pieces()["weights_llama3_1_8b"], seconds=0.2), Place("cpu", "tiny", tmp_path)
    result = command.run(piece, place, {}, 0.2)
    assert result.found.state == FAILED
    assert "time limit of 0.2 s" in result.found.reason
    assert command.run(piece, place, {}, 0.1) is None  # the command had no more time


# --- the block -------------------------------------------------------------------------------------------------------


# --- tests and the race ----------------------------------------------------------------------------------------------

INTERNAL_ERROR = """
import pytest
pytestmark = pytest.mark.gpu
def test_skips(): pytest.skip("no such thing")
def test_ends_pytest(): pytest.exit("the GPU fell off the bus", returncode=3)
"""


@pytest.mark.parametrize(
    ("group", "content", "state", "reason"),
    [
        ("skips", "import pytest; pytest.skip('needs a GPU', allow_module_level=True)", SKIPPED, "needs a GPU"),
        ("breaks", "import nothing_like_it", FAILED, "test_gpu_breaks.py"),
        ("is_empty", "def test_without_the_mark(): pass", FAILED, "pytest ended with status 5"),
        ("ends", INTERNAL_ERROR, FAILED, "pytest ended with status 3"),
    ],
)
def test_a_group_passes_only_where_pytest_ended_well(tmp_path, monkeypatch, group, content, state, reason):
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / f"test_gpu_{group}.py").write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(testing.DEVICE, "cpu")
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    found = testing.run_tests(Place("cpu", "tiny", tmp_path), group)
    assert (found.state, found.reason) == (state, reason)
    assert found.figures[SKIPPED] == (group in ("skips", "ends"))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "is_checkpointed"), [(90, False), (80, True), (10, None)])
def test_runs_that_are_compared_checkpoint_together_or_not_at_all(tmp_path, monkeypatch, room, is_checkpointed):
    """CeRA takes gradient checkpointing where LoRA alone needs it."""
    trained = []

    def peak(place, settings):
        is_lora = "+recipe=math_lora_r512" in settings
        return (20 if runs.CHECKPOINTED in settings else 66) + 19 * is_lora

    def train(config):
        trained.append(config)
        raise StopIteration

    monkeypatch.setattr(runs, "_planned_peak", peak)
    monkeypatch.setattr(runs, "_room", lambda place: room)
    monkeypatch.setattr(Place, "model", lambda place, name: name)
    monkeypatch.setattr("cera_train.training.train.train", train)
    for kind in ("cera", "lora"):
        if is_checkpointed is None:
            assert runs.nemo(Place("cuda", "full", tmp_path), kind).state == SKIPPED
        else:
            with pytest.raises(StopIteration):
                runs.nemo(Place("cuda", "full", tmp_path), kind)
    assert [config.model.gradient_checkpointing for config in trained] == [is_checkpointed] * len(trained)
    if trained:
        cera, lora = trained
        assert (cera.adapter.kind, lora.adapter.kind) == ("cera", "lora")
        assert cera.train == lora.train
        assert cera.train.micro_batch_tokens == cera.data.max_length == 4096  # one sequence at a time


# --- contestants -----------------------------------------------------------------------------------------------------


# --- in miniature ----------------------------------------------------------------------------------------------------

MINIATURE = [
    *("race_unsloth_llama3_1_8b_bfloat16", "weights_llama3_1_8b", "tests_answers", "math_r64_nf4_llama3_1_8b"),
    *("race_cera_llama3_1_8b_bfloat16", "decoding_llama3_1_8b", "nemo_cera"),
]


def miniature(folder: Path, *more: str) -> list[str]:
    common = ["--device=cpu", "--size=tiny", f"--output={folder}"]
    return [sys.executable, "-m", "benchmarks.gpu", *common, *more]


@pytest.mark.slow
@needs_smollm2
def test_the_whole_command_in_miniature_resumes_after_a_kill(tmp_path):
    arguments = miniature(tmp_path, "--piece", *MINIATURE)
    started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    results = tmp_path / "tiny_cpu"
    first, second = (results / f"{name}.json" for name in MINIATURE[:2])
    while not first.exists():
        assert started.poll() is None
        time.sleep(0.1)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    stamp = first.stat().st_mtime_ns
    assert not second.exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert first.stat().st_mtime_ns == stamp
    states = {name: json.loads((results / f"{name}.json").read_text())["found"] for name in MINIATURE}
    skipped = states.pop("race_unsloth_llama3_1_8b_bfloat16")
    assert {found["state"] for found in states.values()} == {PASSED}, done.stdout
    assert (skipped["state"], skipped["reason"]) == (SKIPPED, "unsloth is not installed")
    assert done.returncode == 0
    for column in ("| tests |", "| run |", "| race |", "| new tokens/s by rows in the batch |"):
        assert column in done.stdout
