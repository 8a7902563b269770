"""How every command starts and ends: one line for a mistake, a traceback for a bug. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.plugins.plugin import Plugin
from omegaconf import DictConfig, OmegaConf, open_dict

from cera_train import __version__
from cera_train.cli.composition import register_configs, register_plugins
from cera_train.cli.mistakes import SCHEMAS, explain_composition, for_hydra
from cera_train.common.errors import explain
from cera_train.common.files import config_dir
from cera_train.common.trust import clean, redact
from cera_train.distributed.processes import join_slurm_step

PROGRAMS = {
    **{"cera-train": "train:main", "cera-eval": "evaluate:main", "cera-plan": "plan:main"},
    **{"cera-chat": "serving:chat_main", "cera-export": "serving:export_main"},
    **{"cera-report": "report:main", "cera-sweep": "report:sweep_main"},
}
"""Command -> the file of cli/ and its function."""


def main() -> None:
    """The command by whose name this process was started. --help imports the settings and nothing else of a command."""
    name = Path(sys.argv[0]).stem
    program = name if name in PROGRAMS else "cera-train"  # `python -m cera_train`
    if program in SCHEMAS and {"--help", "-h"} & set(sys.argv):
        start_hydra(program, lambda _: None)
    else:
        module, _, function = PROGRAMS[program].partition(":")
        getattr(importlib.import_module(f"cera_train.cli.{module}"), function)()


def start(program: str, command: Callable[[], Any]) -> None:
    """Runs a command as a whole process."""
    if "--version" in sys.argv:
        print(f"cera-train {__version__}")
        return
    is_debug = "--debug" in sys.argv
    os.environ["CERA_TRAIN_DEBUG"] = "1" if is_debug else ""
    if not (is_debug or sys.warnoptions):
        warnings.simplefilter("ignore")  # libraries' warnings, with paths of site-packages, before our one line
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # and in the processes of a run
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    join_slurm_step(os.environ)
    try:
        with errors_in_one_line(program):
            command()
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()
    except KeyboardInterrupt:
        sys.exit(130)


def start_hydra(
    program: str,
    command: Callable[[DictConfig], Any],
    plugins: Mapping[str, type[Plugin]] | None = None,
) -> None:
    """`start` for a command of a composed config. The only place that changes sys.argv, which Hydra reads.

    Args:
        command: explains its errors itself: Hydra prints a report about an error that leaves it.
        plugins: sweepers and launchers of ours, see `register_plugins`.
    """
    config_name = "config" if program == "cera-train" else program.removeprefix("cera-")

    def compose_and_run() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # composition errors come out whole, to be explained here
        register_configs()
        register_plugins(plugins or {})
        sys.argv[1:] = for_hydra(program, sys.argv[1:])
        if "--help" in sys.argv:
            print_help(config_name, [word for word in sys.argv[1:] if not word.startswith("-")])
            return
        main = hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name=config_name)(command)
        # Only training's sweeps have a folder: the multirun.yaml that Hydra writes for the others is thrown away.
        with contextlib.nullcontext() if program == "cera-train" else tempfile.TemporaryDirectory() as folder:
            sys.argv += [f"hydra.sweep.dir={folder}"] if folder else []
            main()

    start(program, compose_and_run)


def print_help(config_name: str, overrides: list[str]) -> None:
    """Prints a command's `hydra.help.template` with its config. Hydra's own --help reads every file of conf/ first."""
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        config = hydra.compose(config_name, overrides, return_hydra_config=True)
    template = config.hydra.help.template
    with open_dict(config):
        del config["hydra"]
    print(template.replace("$CONFIG", OmegaConf.to_yaml(config)))


def leave_closed_pipe() -> NoReturn:
    """Ends the process quietly: the reader closed the pipe, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Prints a mistake in one line and exits with status 2; prints the traceback of a bug and exits with 1."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        sys.exit(1 if print_error(program, error) is None else 2)


def print_error(program: str, error: Exception) -> str | None:
    """Prints one line for an error that the user can mend and returns it; for any other prints the traceback."""
    message = explain(error) or explain_composition(error, program)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        message = f"{str(error.filename)[:40]}...: too long for the name of a file or folder. Shorten it."
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        print(clean(redact("".join(traceback.format_exception(error)))), file=sys.stderr)
    if message is None:
        return None
    message = clean(redact(message))
    print(f"{program}: {message}", file=sys.stderr)
    return message
