"""How every command starts and ends: a mistake is one line, a bug a traceback, and a signal one
line from the first import on. So nothing heavy is imported here before signals are handled."""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from cera_train import __version__
from cera_train.common.errors import UserError, explain
from cera_train.common.signals import STOPPED, Interrupted, stop_at_once
from cera_train.common.trust import clean, redact

PROGRAMS = {
    "cera-train": "train:main",
    "cera-eval": "runs:eval_main",
    "cera-chat": "runs:chat_main",
    "cera-export": "runs:export_main",
    "cera-report": "runs:report",
    "cera-sweep": "runs:sweep",
    "cera-plan": "plan:main",
}
"""Command -> the file of cli/ and its function."""


def main() -> None:
    """Runs the command whose name this process was started by. --help imports nothing but the
    settings."""
    open_streams()
    name = Path(sys.argv[0]).stem
    program = name if name in PROGRAMS else "cera-train"  # `python -m cera_train`
    if "--version" in sys.argv:
        print(f"cera-train {__version__}")
        return
    is_debug = "--debug" in sys.argv
    os.environ["CERA_TRAIN_DEBUG"] = "1" if is_debug else ""
    if not (is_debug or sys.warnoptions):
        # Libraries would print warnings with site-packages paths before our one line.
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # and in the processes of a run
    with signals_in_one_line(program), errors_in_one_line(program):
        from cera_train.cli.help import run_command  # imports Hydra

        run_command(program, f"cera_train.cli.{PROGRAMS[program]}")
        sys.stdout.flush()


def open_streams() -> None:
    """Opens /dev/null for each closed standard stream, as after `<&-`: a file opened later would
    get its number, and what a library prints. A letter that the output's encoding lacks is printed
    as its code, here and in the processes of a run."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"


@contextlib.contextmanager
def signals_in_one_line(program: str) -> Iterator[None]:
    """Ends the command at once by Ctrl-C or SIGTERM, with one line and status 128 plus the signal,
    unless it handles them itself."""
    STOPPED.clear()
    handlers = {
        number: signal.signal(number, stop_at_once) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except KeyboardInterrupt:  # by Python's own handler, as in a conversation
        STOPPED.append(signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # Whatever the code that was interrupted made of `stop_at_once`'s exception.
        if STOPPED:
            print(f"{program}: stopped by {signal.Signals(STOPPED[0]).name}.", file=sys.stderr)
            sys.exit(128 + STOPPED[0])


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Prints a mistake in one line and exits with status 2, or that of its error; prints the
    traceback of a bug and exits with 1."""
    try:
        yield
    except Exception as error:
        is_bug = print_error(program, error) is None
        sys.exit(1 if is_bug else getattr(error, "status", UserError.status))


def print_error(program: str, error: Exception) -> str | None:
    """Prints one line for an error that the user can fix and returns it; for any other prints the
    traceback. Exits silently if the reader of stdout has closed the pipe, as `| head` does.

    Raises:
        Interrupted: a signal caused the error, as in the middle of an import.
    """
    if STOPPED:
        raise Interrupted(STOPPED[0]) from error
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    from cera_train.cli.mistakes import explain_composition  # imports Hydra

    message = explain(error) or explain_composition(error, program)
    if message is None or os.environ.get("CERA_TRAIN_DEBUG"):
        print(clean(redact("".join(traceback.format_exception(error)))), file=sys.stderr)
    if message is not None:
        message = clean(redact(message)).replace("\n", "\\n")
        print(f"{program}: {message}", file=sys.stderr)
    return message
