"""The command line as its users meet it: real processes, one clear line for every mistake, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import WITHOUT_TORCH, command

from cera_train import __version__
from cera_train.cli.mistakes import SCHEMAS, options
from cera_train.cli.start import PROGRAMS, main
from cera_train.cli.train import is_as_published
from cera_train.common.errors import explain
from cera_train.common.files import cached_folder, write_text

LOADING = "loading    PyTorch and transformers\n"
"""The first sign of life, within a second."""


@pytest.fixture
def tiny_arguments(tiny_folder) -> list[str]:
    return [
        f"model.path={tiny_folder}",
        *("model.dtype=float32", "data.max_length=256", "adapter.r=4", "train.max_updates=4", "name=run"),
    ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_the_version_of_the_package(monkeypatch, capfd, program):
    monkeypatch.setattr(sys, "argv", [program, "--version"])
    main()
    assert capfd.readouterr().out == f"cera-train {__version__}\n"


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_answers_without_torch_and_names_every_choice(tmp_path, name):
    done = command(name, "--help", cwd=tmp_path, **WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    groups = {"cera-eval": ["task", "generation", "model", "data"], "cera-export": ["model", "data"]}
    groups["cera-chat"] = ["generation", "model"]
    for group in groups.get(name, ["recipe", "model", "adapter", "data"]):
        assert re.search(rf"^ +{group} +{' '.join(options(group))}$", done.stdout, re.MULTILINE), group
    assert "--debug" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_shell_completes_settings_and_choices(tmp_path):
    done = command("cera-train", "-sc", "query=bash", cwd=tmp_path, COMP_LINE="cera-train adapter=lo")
    assert done.stdout.split() == ["adapter=lora", "adapter=loraplus"], done.stderr


IMPORTS = """
import gc, sys
sys.argv[0] = "cera-train"
from cera_train.common.imports import heavy_imports

with heavy_imports():
    import torch
    assert not gc.isenabled()
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 10_000
with heavy_imports():
    assert gc.isenabled()
assert gc.get_freeze_count() == frozen
from cera_train.training.train import launch
from cera_train.cera import CeraConfig
from cera_train.cera.layer import CeraLayer
CeraLayer(torch.nn.Linear(8, 8), "default", CeraConfig(r=2))
print(sorted({"bitsandbytes.nn", "datasets", "pandas", "matplotlib", "wandb"} & sys.modules.keys()))
import bitsandbytes
quantised = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
print(CeraLayer(quantised, "default", CeraConfig(r=2)).quantization_backend.backend_name)
"""


@pytest.mark.slow
def test_heavy_imports_keep_the_garbage_collector_out_once_and_leave_out_what_not_every_run_needs():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\nbnb 8bit\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=nobody/nothing"], "model.path=nobody/nothing: cannot be loaded.*local folder"),
        (["data=gsm8k", "data.train_files=[broken.jsonl]", "data.eval_rows=1"], "broken.jsonl:2: broken JSON"),
        (["optimizer.lr=1e30", "optimizer.weight_decay=0"], r"loss of update \d or its gradient is not finite"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capfd, tiny_arguments, arguments, message):
    """In this process, which has imported torch."""
    (tmp_path / "broken.jsonl").write_text('{"question": "1?", "answer": "1"}\n{"question": \n')
    monkeypatch.chdir(tmp_path)
    merged = {argument.partition("=")[0]: argument for argument in [*tiny_arguments, *arguments]}
    monkeypatch.setattr(sys, "argv", ["cera-train", *merged.values()])
    with pytest.raises(SystemExit, match="^2$"):
        main()
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    # A run that had begun leaves in its folder how far it came.
    assert (tmp_path / "outputs" / "run").exists() == ("finite" in message)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_real_run_with_its_status_and_the_same_command_finishes_it(
    tmp_path, tiny_arguments, number, status
):
    arguments = [*tiny_arguments, "train.max_updates=100000", "train.eval_every=null"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cera_train", *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "outputs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert b"The same command goes on" in output
    assert errors == LOADING.encode()
    (checkpoint,) = (tmp_path / "outputs" / "run" / "checkpoints").iterdir()
    assert json.loads(metrics.read_text().splitlines()[-1])["update"] == int(checkpoint.name)


@pytest.mark.slow
def test_the_output_is_calm_and_aligned(tmp_path, tiny_arguments):
    done = command("cera-train", *tiny_arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == LOADING
    for label in ("run", "model", "adapter", "device", "train", "eval", "shared", "example"):
        assert re.search(rf"^{label:<11}\S", done.stdout, re.MULTILINE), label
    assert re.search(r"\[\[.*</s>\]\]", done.stdout)
    for label in ("perplexity", "effective rank", "trainable", "speed", "time", "folder"):
        assert re.search(rf"^{label:<16}\S", done.stdout, re.MULTILINE), label
    again = command("cera-train", *tiny_arguments, cwd=tmp_path)
    assert "finished" in again.stdout


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_has_conf_and_recipes(tmp_path):
    root = Path(__file__).resolve().parents[2]
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel],
        check=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cera_train", "--cfg", "job", "+recipe=math_r64"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "path: meta-llama/Llama-3.1-8B" in done.stdout
    assert "r: 64" in done.stdout


def test_out_of_memory_names_the_settings_to_lower():
    import torch

    for error in (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ):
        message = explain(error)
        for setting in ("train.micro_batch_tokens", "model.gradient_checkpointing", "model.quantization=nf4"):
            assert setting in message


def test_what_the_system_refuses_is_named_with_the_mend(tmp_path, monkeypatch):
    mend = "Name another file, or set output_dir and $CERA_TRAIN_CACHE to folders you may write to."
    refused = PermissionError(errno.EACCES, "Permission denied", "rows.jsonl")
    assert explain(refused) == f"no access to rows.jsonl: Permission denied. {mend}"
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("file", "Not a directory"), ("loop", "Too many levels of symbolic links")):
        monkeypatch.setenv("CERA_TRAIN_CACHE", str(tmp_path / name))
        with pytest.raises(OSError, match=reason) as refused:
            cached_folder("tokens/1", Path.mkdir)
        assert explain(refused.value) == f"no access to {tmp_path}/{name}/tokens: {reason}. {mend}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            write_text(tmp_path / "file", "long" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a file may grow no further" in explain(refused.value)
    assert "Raise `ulimit -f` and repeat the command" in explain(refused.value)


def test_a_bug_of_ours_keeps_its_traceback():
    assert explain(AttributeError("'NoneType' object has no attribute 'x'")) is None
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["+recipe=math_r64", "name=mine", "tracker=wandb", "train.micro_batch_tokens=8192"], True),
        (["+recipe=math_r64", "adapter.r=32"], False),
        (["+recipe=math_r64", "model=llama3_2_1b"], False),
    ],
)
def test_the_papers_figures_hold_only_for_what_the_paper_ran(overrides, kept):
    assert is_as_published(overrides) == kept
