"""The wall around code that is not ours: rewards, trackers, the Python files of a model. Whatever
it raises, SystemExit too, becomes a UserError with the line that raised it."""

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from cera_train.common.errors import UserError
from cera_train.common.signals import Interrupted

NOT_THE_USERS = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(__file__).parents[1]),
    "<",  # <frozen importlib._bootstrap>
)
"""Starts of the file names of Python, its libraries and this package."""


OF_SIGNALS = (KeyboardInterrupt, Interrupted)
"""What signals raise, by Python's handler or ours."""

LONGEST_REASON = 200  # characters of an error's message


@contextlib.contextmanager
def user_code(place: str, fix: str = "") -> Iterator[None]:
    """Turns whatever is raised inside into a UserError, except a signal's exception."""
    try:
        yield
    except OF_SIGNALS:
        raise
    except BaseException as error:
        raise UserError(f"{place}: {reason_of(error)}. {fix}".strip()) from error


def reason_of(error: BaseException) -> str:
    """`IndexError: list index out of range (my_rewards.py:7)`: the innermost line that is the
    user's, if there is one."""
    text = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".:")
    lines = [
        f" ({frame.filename}:{frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(NOT_THE_USERS)
    ]
    return f"{type(error).__name__}{f': {text}' if text else ''}{lines[-1] if lines else ''}"
