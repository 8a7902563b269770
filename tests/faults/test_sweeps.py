"""Real sweeps: cut, failed and started again."""

import signal
from pathlib import Path

import pytest
import torch
from made_sweeps import TINY, content_of, make_job, start, states
from tiny_runs import metrics_of, wait_until

from cera_train.report.readers import read_runs
from cera_train.settings.run import Config
from cera_train.sweep.folder import JOBS, RECORD


@pytest.mark.slow
def test_the_same_command_skips_the_finished_goes_on_with_the_cut_and_runs_the_missing(
    sweep_here,
):
    sweep = sweep_here / "outputs" / "tiny"
    command = [*TINY, "train.max_updates=100"]
    failing, finished, cut, missing = (
        f"adapter={kind},adapter.activation={gate}"
        for kind in ("lora", "cera")
        for gate in ("relu", "silu")
    )
    process = start(*command, cwd=sweep_here)
    wait_until(lambda: process.poll() is not None or len(metrics_of(sweep / cut)) > 10, every=0.02)
    assert list(states(sweep).values()) == ["failed", "finished", "running", "waiting"]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "The same command resumes it" in output
    assert list(states(sweep)) == [failing, finished, cut, missing]
    assert list(states(sweep).values()) == ["failed", "finished", "stopped", "waiting"]
    (checkpoint,) = (sweep / cut / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name) < 100

    before = content_of(sweep / finished)
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert content_of(sweep / finished) == before
    assert output.startswith("finished   1 of 4 jobs, which are not started again\n")
    assert f"{cut}, 100 updates of 16 sequences, {int(checkpoint.name)} done" in output
    assert list(states(sweep).values()) == ["failed", "finished", "finished", "finished"]
    # Each error once, and nothing of Hydra's beside the jobs.
    assert sorted(line.split()[0] for line in errors.splitlines()) == ["cera-train:", "loading"]
    assert {path.name for path in sweep.iterdir()} == {JOBS, RECORD, finished, cut, missing}
    assert [run.name for run in read_runs([sweep])] == [cut, missing, finished]


@pytest.mark.slow
def test_a_job_that_diverges_stops_no_other_nor_the_next_batch(sweep_here, run_command, capfd):
    arguments = ["adapter=cera", "adapter.activation=silu", "optimizer.weight_decay=0"]
    one_by_one = ["optimizer.lr=1e30,1e-3", "hydra.sweeper.max_batch_size=1"]
    assert run_command("cera-train", *TINY, *arguments, *one_by_one) == 0
    output, errors = capfd.readouterr()
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["diverged", "finished"]
    assert len(errors.splitlines()) == 1
    assert "or its gradient is not finite" in errors
    assert "job        2 of 2: " in output
    # It is a result: the same command leaves it, and another one shows it.
    assert run_command("cera-train", *TINY, *arguments, *one_by_one) == 0
    assert "finished   1 of 1 jobs, which are not started again" in capfd.readouterr().out
    assert run_command("cera-train", *TINY, *arguments, "optimizer.lr=1e-3") == 0
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["finished", "diverged"]


def test_a_bug_in_a_job_keeps_its_traceback_and_stops_no_other(
    sweep_here, run_command, monkeypatch, capfd
):
    def train(config: Config) -> dict:
        if config.adapter.activation == "relu":
            raise RuntimeError("of ours")
        # A second command finds the folder in use meanwhile.
        make_job(Path(config.output_dir), config.name, 1.5, error="another run is writing to it")
        return {"eval/perplexity": 1.5}

    monkeypatch.setattr("cera_train.training.train.launch", train)
    assert run_command("cera-train", *TINY, "adapter=cera") == 1
    output, errors = capfd.readouterr()
    assert errors.count("Traceback") == 1
    assert "a bug: RuntimeError: of ours" in output
    assert "job        2 of 2: " in output
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["failed", "finished"]


def test_the_peak_memory_of_a_job_is_its_own():
    """The jobs of a sweep share a process, whose peak would be the largest job's."""
    from cera_train.distributed.accelerator import peak_memory, prepare_memory

    large = bytearray(300_000_000)
    before = peak_memory(torch.device("cpu"))
    del large
    prepare_memory()
    assert peak_memory(torch.device("cpu")) < before - 250_000_000
