"""How every command starts and ends: one line for a mistake, a traceback for a bug. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cera_train.cli.composition import Composition, config_dir, is_about_a_null_section, options, register_configs
from cera_train.cli.hydra_guard import guard_composition
from cera_train.common.errors import UserError, explain
from cera_train.common.secrets import redact
from cera_train.common.trust import clean, refuse_pickled_configs
from cera_train.distributed.processes import join_slurm_step


def start(composition: Composition, command: Callable[[], Any], *more: str) -> None:
    """Runs a command as a whole process.

    Args:
        more: arguments that the command adds for Hydra.
    """
    os.environ["CERA_TRAIN_DEBUG"] = "1" if "--debug" in sys.argv else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # composition errors come out whole, to be explained here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    join_slurm_step(os.environ)
    register_configs()
    guard_composition()
    try:
        with errors_in_one_line(composition):
            sys.argv[1:] = [*_arguments(sys.argv[1:]), *more]
            command()
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments(arguments: list[str]) -> list[str]:
    """The arguments as Hydra should read them.

    Raises:
        UserError: one would make Hydra read a pickle, or is a mistake that Hydra takes for a bug of its own.
    """
    refuse_pickled_configs(arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if value == "null" and (config_dir("conf") / key).is_dir():
            raise UserError(
                f"{argument}: expected the name of a file in conf/{key}. There are: {', '.join(options(key))}."
            )
    return [_with_folder_quoted(argument) for argument in arguments if argument != "--debug"]


def _with_folder_quoted(argument: str) -> str:
    """Lets run=outputs/rank_lr/adapter=cera,adapter.r=64 be a folder: Hydra would read its commas and signs."""
    key, _, value = argument.partition("=")
    is_folder = any(sign in value for sign in ",=") and "'" not in value and Path(value).is_dir()
    return f"{key}='{value}'" if is_folder else argument


def hydra_command(config_name: str) -> Callable:
    """Decorates a function of a composed config. It has to explain its errors itself: Hydra would print a report of its
    own about an error that left it."""
    return hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name=config_name)


# --- how it ends -----------------------------------------------------------------------------------------------------


def leave_closed_pipe() -> NoReturn:
    """Ends the process quietly: the reader closed the pipe, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


@contextlib.contextmanager
def errors_in_one_line(composition: Composition) -> Iterator[None]:
    """Prints a mistake in one line and exits with status 2; prints the traceback of a bug and exits with 1."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        sys.exit(1 if print_error(composition, error) is None else 2)


def print_error(composition: Composition, error: Exception) -> str | None:
    """Prints one line for an error that the user can mend and returns it; for any other prints the traceback."""
    is_composition = isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError))
    is_composition = is_composition or is_about_a_null_section(error)
    message = composition.explain(error, sys.argv[1:]) if is_composition else explain(error)
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        print(clean(redact("".join(traceback.format_exception(error)))), file=sys.stderr)
    if message is None:
        return None
    message = clean(redact(message))
    print(f"{composition.program}: {message}", file=sys.stderr)
    return message


def refuse_arguments(program: str) -> Callable[[str], NoReturn]:
    """An `argparse` error handler: one line, like every other mistake."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (see {program} --help).")

    return refuse
