"""Several real processes over gloo compute the same as one, whoever starts them; when one of them
fails, hangs or is told to stop, the others end with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from commands import command
from conftest import TINY
from made_sweeps import start
from moe_models import make_mixture
from several_processes import cut_copy, popen, train_in_processes
from tiny_runs import (
    adapter_bytes,
    all_losses_of,
    evaluations_of,
    losses_of,
    metrics_of,
    wait_until,
)

from benchmarks.tiny_models import tiny_model
from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.distributed.accelerator import start_accelerator
from cera_train.distributed.processes import (
    error_of,
    join_slurm_step,
    processes_to_start,
)
from cera_train.runs.results import LOSSES_AFTER, TokenLosses
from cera_train.settings.distributed import DistributedConfig, LaunchConfig
from cera_train.settings.model import ModelConfig
from cera_train.training.train import train


@pytest.fixture
def arguments(tiny_folder, tmp_path) -> list[str]:
    """The tiny model for 20 updates. 79 rows in batches of 13: uneven shares of several
    micro-batches, and epochs that end in a batch of one row, which leaves other processes without
    rows."""
    return [
        f"model.path={tiny_folder}",
        *TINY,
        "adapter.r=4",
        "adapter.dropout=0",
        "train.batch_size=13",
        "train.max_updates=20",
        "train.eval_every=8",
        "train.micro_batch_tokens=300",
        "train.save_every=10",
        "train.keep=9",
        f"output_dir={tmp_path / 'outputs'}",
    ]


def printed_by(run: subprocess.Popen[str]) -> tuple[str, str]:
    """What a command prints until it ends; to stderr, without the line about its start."""
    out, err = run.communicate(timeout=240)
    return out, err.removeprefix("loading    PyTorch and transformers\n")


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_losses_equal_those_of_one_process_for_any_number_of_processes_and_either_strategy(
    tmp_path, arguments, compose, processes
):
    """Every loss of 20 updates, perplexity and spectra, even when the run resumes from a checkpoint
    of one process."""
    train(compose(*arguments, "name=one"))
    other = "train.micro_batch_tokens=700"
    outputs = tmp_path / "outputs"
    for strategy in ("ddp", "fsdp"):
        cut_copy(outputs / "one", outputs / f"{strategy}_resumed", 10)
    runs = {
        f"{strategy}_{case}": [
            *settings,
            f"distributed.strategy={strategy}",
            f"name={strategy}_{case}",
        ]
        for case, settings in {"as_one": [], "otherwise": [other], "resumed": []}.items()
        for strategy in ("ddp", "fsdp")
    }
    out = train_in_processes(
        [[*arguments, *settings] for settings in runs.values()], processes, tmp_path
    )
    assert out.count(f"{processes} x cpu, FSDP2") == 3
    one = all_losses_of(outputs / "one")
    assert len(one) == 24
    for name in runs:
        assert all_losses_of(outputs / name) == pytest.approx(one, rel=1e-5), name
        for evaluation, expected in zip(
            evaluations_of(outputs / name), evaluations_of(outputs / "one"), strict=True
        ):
            assert evaluation == pytest.approx(expected, rel=1e-4), name
        measured, expected = (
            TokenLosses.read(outputs / each / LOSSES_AFTER) for each in (name, "one")
        )
        assert measured.tokens.tolist() == expected.tokens.tolist()
        assert measured.losses == pytest.approx(expected.losses, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_sharding_equals_one_process_for_every_kind_of_adapter_and_base(
    tmp_path, arguments, compose, tokenizer
):
    """Losses, spectra, and the saved adapter. Each kind shards in its own way."""
    make_mixture("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mixture")
    tiny_model("longcat_flash").save_pretrained(tmp_path / "idle")  # does not call its routers
    for folder in ("mixture", "idle"):
        tokenizer.save_pretrained(tmp_path / folder)
    all_linear = "adapter.target_modules=all-linear"
    kinds = {
        "dora": ["adapter=dora", "adapter.r=4"],
        "mix": ["adapter=cera_mix", "adapter.r=4", "adapter.dropout=0"],
        "experts": [f"model.path={tmp_path / 'mixture'}", all_linear, "adapter.experts=true"],
        "idle": [f"model.path={tmp_path / 'idle'}", all_linear],
        "nf4": ["model.quantization=nf4", "model.dtype=bfloat16", all_linear],
        "checkpointed": [
            "model.gradient_checkpointing=true",
            "adapter.target_modules=[q_proj,lm_head]",
        ],
    }
    short = [*arguments, "train.max_updates=6", "train.eval_every=3", "train.compile=false"]
    for kind, settings in kinds.items():
        train(compose(*short, *settings, f"name={kind}_one"))
    fsdp = "distributed.strategy=fsdp"
    runs = [[*short, *settings, fsdp, f"name={kind}_fsdp"] for kind, settings in kinds.items()]
    train_in_processes(runs, 2, tmp_path)
    outputs = tmp_path / "outputs"
    for name in kinds:
        tolerance = 2**-8 if name == "nf4" else 1e-5  # 16-bit sums in another order
        one = outputs / f"{name}_one"
        fsdp = outputs / f"{name}_fsdp"
        assert all_losses_of(fsdp) == pytest.approx(all_losses_of(one), rel=tolerance), name
        for evaluation, expected in zip(evaluations_of(fsdp), evaluations_of(one), strict=True):
            assert evaluation == pytest.approx(expected, rel=max(tolerance, 1e-4), abs=1e-3), name
        shares = [read_json(run / "result.json")["trainable_share"] for run in (one, fsdp)]
        assert shares[0] == shares[1]
        assert len(adapter_bytes(fsdp)) == len(adapter_bytes(one))


@pytest.mark.slow
def test_scaled_gradients_are_clipped_by_their_unscaled_norm_under_either_strategy(
    tmp_path, arguments, compose
):
    """As in float16 on a GPU."""
    short = [
        *arguments,
        "train.max_updates=6",
        "optimizer.max_grad_norm=0.1",
        "adapter.target_modules=[q_proj,lm_head]",
    ]
    train(compose(*short, "name=one"))
    strategies = ("ddp", "fsdp")
    runs = [
        [*short, f"distributed.strategy={strategy}", f"name={strategy}"] for strategy in strategies
    ]
    train_in_processes(runs, 2, tmp_path, "scaled")
    for key in ("train/loss", "train/grad_norm"):
        one, *others = (
            [line[key] for line in metrics_of(tmp_path / "outputs" / name) if key in line]
            for name in ("one", *strategies)
        )
        for values in others:
            assert values == pytest.approx(one, rel=1e-5)
    assert min(one) > 0.1  # every norm is clipped


# --- who starts the processes ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_of_accelerate_launch_starts_no_others(tmp_path, arguments):
    """With GPUs it starts several processes by torchrun, on CPUs one."""
    launcher = ["--cpu", "--num_processes=1", "--num_machines=1", "-m", "cera_train"]
    words = [*arguments, "launch.processes=3", "train.max_updates=2"]
    done = command("accelerate", "launch", *launcher, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 x cpu" in done.stdout
    assert done.stdout.count("folder          ") == 1


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path, arguments, compose):
    """Two launchers that find each other on loopback."""
    train(compose(*arguments, "train.max_updates=6", "name=one"))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    meeting = f"--rdzv_backend=c10d --rdzv_endpoint=localhost:{port} --rdzv_id=two".split()
    meeting += ["--nnodes=2", "--nproc_per_node=1", "--local_addr=localhost"]
    words = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "cera_train"]
    words += [*arguments, "train.max_updates=6", "name=two"]
    nodes = [popen(*words, cwd=tmp_path) for _ in range(2)]
    ends = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert "".join(out for out, _ in ends).count("2 x cpu") == 1
    one, two = (all_losses_of(tmp_path / "outputs" / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_tasks_of_a_slurm_step_are_recognised():
    variables = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[003-004,7],login1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    step = dict(variables)
    join_slurm_step(step)
    assert step == variables | {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "23456",
        "OMP_NUM_THREADS": "1",
    }
    next_step = variables | {"CUDA_VISIBLE_DEVICES": "1", "SLURM_STEP_ID": "1"}
    join_slurm_step(next_step)
    assert (next_step["LOCAL_RANK"], next_step["MASTER_PORT"]) == ("0", "24453")
    for other in (
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "RANK": "0"},
    ):
        before = dict(other)
        join_slurm_step(other)
        assert other == before


MEETING = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
ALL = MEETING | {"LOCAL_RANK": "1"}


def test_variables_of_a_launcher_that_is_gone_are_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (ALL | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    config = DistributedConfig(timeout=1)
    with pytest.raises(UserError, match="RANK=0, WORLD_SIZE=2, .* unset RANK WORLD_SIZE"):
        start_accelerator(ModelConfig("m", dtype="float32"), None, config)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "several processes were started"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR=None, .* unset RANK WORLD_SIZE"),
    ],
)
def test_a_part_of_a_launchers_variables_is_one_line(variables, named):
    # Accelerate sets the others.
    with patch.dict(os.environ, variables), pytest.raises(UserError, match=named):
        start_accelerator(ModelConfig("m", dtype="float32"), None, DistributedConfig())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_each_gpu_gets_a_process_unless_the_config_says_otherwise(monkeypatch):
    for gpus, wanted, expected in [(0, "auto", 1), (8, "auto", 8), (8, "2", 2)]:
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert processes_to_start(LaunchConfig(wanted)) == expected
    with pytest.raises(ValueError, match="launch.processes=9, but this machine shows 8 GPUs"):
        processes_to_start(LaunchConfig("9"))


# --- when one of them stops -----------------------------------------------------------------------


def processes_of(run: subprocess.Popen[str]) -> list[int]:
    """The training processes that a command started, in the order of their ranks."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return sorted(
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )


@pytest.fixture
def endless(arguments, tmp_path):
    """A run of two processes, caught in the middle."""
    settings = [
        "train.max_updates=100000",
        "train.eval_every=null",
        "launch.processes=2",
        "distributed.timeout=10",
    ]
    run = start(*arguments, *settings, "name=run", cwd=tmp_path)
    wait_until(
        lambda: run.poll() is not None or len(losses_of(tmp_path / "outputs" / "run")) >= 12,
        240,
        0.05,
    )
    yield run
    run.kill()


@pytest.mark.slow
def test_a_signal_to_the_command_makes_its_processes_save_and_stop(endless, tmp_path):
    endless.send_signal(signal.SIGTERM)
    out, err = printed_by(endless)
    assert (endless.returncode, err) == (128 + signal.SIGTERM, "")
    updates = len(all_losses_of(tmp_path / "outputs" / "run")) - 1  # one evaluation came before
    assert (tmp_path / "outputs" / "run" / "checkpoints" / str(updates)).is_dir()
    assert out.count("stopped    ") == 1


@pytest.mark.slow
def test_a_signal_while_the_processes_load_ends_the_command(arguments, tmp_path):
    run = start(*arguments, "launch.processes=2", "name=run", cwd=tmp_path)
    wait_until(lambda: len(processes_of(run)) == 2, every=0.05)
    time.sleep(2)  # they are still importing: no handler is installed yet
    run.send_signal(signal.SIGINT)
    _, err = printed_by(run)
    assert (run.returncode, err) == (128 + signal.SIGINT, "")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_is_named_once(endless, tmp_path):
    _, other = processes_of(endless)
    os.kill(other, signal.SIGKILL)
    _, err = printed_by(endless)
    assert endless.returncode == 2
    assert err.startswith(
        "cera-train: process 1 was killed by SIGKILL: the machine may be out of memory"
    )
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "outputs" / "run" / ".lock").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_an_accelerator_other_than_cuda_is_not_used(monkeypatch):
    """Precision and kernels were chosen for the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    accelerator = start_accelerator(
        ModelConfig(path="x", dtype="float32"), None, DistributedConfig()
    )
    assert accelerator.device == torch.device("cpu")
    assert not accelerator.ddp_handler.broadcast_buffers  # no pass waits for buffers of process 0


@pytest.mark.slow
def test_a_hanging_process_ends_the_run_after_the_time_limit(endless):
    """It stops in the middle of its work; the others notice."""
    os.kill(processes_of(endless)[0], signal.SIGSTOP)
    _, err = printed_by(endless)
    assert endless.returncode == 2
    assert err.startswith("cera-train: process 1 (counted from 0) waited for another that hangs")
    assert len(err.splitlines()) == 1


def test_an_error_of_a_process_keeps_its_type():
    """A mistake is one line for its user, a bug a traceback. test_a_process_that_is_killed... has
    the third kind."""
    for message, kind, words in (
        ("UserError: data.prompt: no such column.", UserError, "data.prompt: no such column."),
        ("ValueError: zip() argument 2 is shorter", RuntimeError, "Traceback ..."),
    ):
        report = {"message": message, "extraInfo": {"py_callstack": "Traceback ..."}}
        error = error_of(1, SimpleNamespace(exitcode=1, message=report))
        assert type(error) is kind
        assert words in str(error)
    aborted = error_of(1, SimpleNamespace(exitcode=-signal.SIGABRT, message=""))
    assert (
        "killed by SIGABRT: it may have waited for another longer than distributed.timeout. The "
        "same" in str(aborted)
    )
