"""The command line as its users meet it: help, completion, an installed wheel, what the system
refuses; and what has to answer at once imports nothing heavy."""

import dataclasses
import importlib
import os
import pkgutil
import re
import site
import subprocess
import sys
import typing
import venv
from pathlib import Path

import pytest
from commands import WITHOUT_TORCH, command, python

import cera_train
from cera_train import __version__
from cera_train.cli.mistakes import SCHEMAS
from cera_train.common.errors import explain
from cera_train.common.files import options
from cera_train.common.settings import Changes, section_of

HELP = """
import sys
from cera_train.cli.start import main
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    main()
    print("=====")
"""


def test_help_answers_without_torch_and_names_every_choice(tmp_path):
    texts = python("-c", HELP, *SCHEMAS, cwd=tmp_path, **WITHOUT_TORCH).split("=====\n")
    groups = {
        "cera-eval": ["task", "generation", "model", "data"],
        "cera-export": ["model", "data"],
        "cera-chat": ["generation", "model"],
    }
    for name, text in zip(SCHEMAS, texts[:-1], strict=True):
        assert "--debug" in text
        for group in groups.get(name, ["recipe", "model", "adapter", "data"]):
            choices = rf"^ +{group} +{' '.join(options(group))}$"
            assert re.search(choices, text, re.MULTILINE), (name, group)
    assert not list(tmp_path.iterdir())


def test_help_for_a_section_explains_its_settings(run_command, capfd):
    assert run_command("cera-train", "--help", "model", "adapter.r", "adapter.r=8") == 0
    printed = capfd.readouterr().out
    assert "\nmodel.quantization=none  # none | nf4\n    `nf4` for the frozen linears" in printed
    assert "\nadapter.r=8\n    Rank. null: PEFT's default" in printed
    assert run_command("cera-eval", "--help", "task") == 0
    assert "\ntask.split=test\n" in capfd.readouterr().out  # of a section that is null


def test_a_shell_completes_settings_and_choices(tmp_path):
    done = command(
        "cera-train", "-sc", "query=bash", cwd=tmp_path, COMP_LINE="cera-train adapter=pe"
    )
    assert done.stdout.split() == ["adapter=peanut", "adapter=peft"], done.stderr


ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_that_of_every_file_that_names_it():
    places = {
        "pyproject.toml": f'version = "{__version__}"',
        "uv.lock": f'name = "cera-train"\nversion = "{__version__}"',
        "CITATION.cff": f"version: {__version__}",
        "CHANGELOG.md": f"## {__version__}",
    }
    assert not [name for name, text in places.items() if text not in (ROOT / name).read_text()]


@pytest.mark.slow
def test_a_wheel_from_an_index_runs_in_an_empty_environment(tmp_path):
    """What it needs comes from this environment, and nothing from the clone."""
    project = tmp_path / "simple" / "cera-train"
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", project, ROOT)
    [wheel] = project.iterdir()
    (project / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    environment = tmp_path / "environment"
    venv.create(environment)
    install = ["install", "--quiet", "--isolated", "--no-deps", "cera-train"]
    index = project.parent.as_uri()
    python("-m", "pip", "--python", environment, *install, "--index-url", index)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text("\n".join(site.getsitepackages()))

    program = str(environment / "bin" / "cera-train")
    for words, expected in (
        (["--version"], f"cera-train {__version__}\n"),
        (["--help"], "math_r64"),
        (["--cfg", "job", "+recipe=math_r64"], "path: meta-llama/Llama-3.1-8B"),
    ):
        done = command(program, *words, cwd=tmp_path, PYTHONPATH="")
        assert expected in done.stdout, done.stderr


def test_out_of_memory_names_the_settings_to_lower():
    import torch

    for error in (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes"
        ),
        MemoryError(),
    ):
        message = explain(error)
        for setting in (
            "train.micro_batch_tokens",
            "model.gradient_checkpointing",
            "model.quantization=nf4",
        ):
            assert setting in message


def test_a_closed_pipe_ends_a_command_without_a_word(tmp_path):
    start = "from cera_train.cli.config import start_hydra"
    program = f"{start}; start_hydra('cera-train', lambda config: print('', flush=True))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert done.returncode == 141
    assert b"Error executing job" not in done.stderr  # Hydra's report


STREAMS = """
import subprocess, sys
from cera_train.cli.start import open_streams
open_streams()
print(chr(0xF6), sys.stdin.isatty(), flush=True)
subprocess.run([sys.executable, "-c", "print(chr(0x6771))"], check=True)
"""


@pytest.mark.parametrize(
    ("closed", "printed"), [("<&- 2>&-", "\\xf6 False\n\\u6771\n"), (">&- 2>&-", "")]
)
def test_a_closed_stream_or_a_letter_that_the_output_lacks_ends_no_command(
    tmp_path, closed, printed
):
    """Nor the processes that a run starts."""
    words = ["-c", f'exec "$0" -c "$1" {closed}', sys.executable, STREAMS]
    done = command("/bin/sh", *words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, printed)


HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")
FOLDERS = ("cli", "sweep", "report", "settings", "common")
LIGHT = (
    "cera_train.adapters.families",
    "cera_train.evaluation.grading",
    "cera_train.evaluation.tasks.",
)
"""Settings are checked by the first; processes that verify answers have a memory limit."""

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cera_train.__path__, "cera_train.")
    if module.name.split(".")[1] in FOLDERS or module.name.startswith(LIGHT)
)

IMPORT_ALL = """
import importlib, sys
sys.argv[0] = "cera-train"
for name in {modules}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "submitit" and name == "cera_train.sweep.cluster", error
    print(name, *sorted(set({heavy}) & sys.modules.keys()))
"""


def test_what_answers_at_once_imports_nothing_heavy():
    assert {"cera_train.settings.run", "cera_train.cli.train", "cera_train.report.page"} <= {
        *MODULES
    }
    assert python("-c", IMPORT_ALL.format(modules=MODULES, heavy=HEAVY)).split("\n")[:-1] == MODULES


def test_every_setting_carries_the_mark_of_what_it_changes():
    """Resuming, the token cache, sweeps and reports go by it: a field without one would be
    forgotten by all."""
    modules = [
        importlib.import_module(name) for name in MODULES if name.startswith("cera_train.settings.")
    ]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
    }
    assert len(kinds) >= 15
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if section_of(typing.get_type_hints(kind)[field.name]) is None:
                assert field.metadata.get("changes") in set(Changes), (
                    f"{kind.__name__}.{field.name}: use setting(...)"
                )
            else:
                assert not field.metadata, f"{kind.__name__}.{field.name}: use section(...)"


def test_a_signal_while_a_library_is_imported_is_one_line(tmp_path, tiny_folder):
    """Code in C turns the exception of a signal into its own."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except BaseException as error:\n"
        "    raise ImportError('initialization failed') from error\n"
    )
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = command("cera-train", f"model.path={tiny_folder}", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "cera-train: stopped by SIGTERM."
    assert "Traceback" not in done.stderr
