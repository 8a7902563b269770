"""`UserError`, and one line for every error that a user can fix. Any other error is a bug and
keeps its traceback."""

import contextlib
import errno
import os
from collections.abc import Iterator

OUT_OF_MEMORY = (
    "Lower train.micro_batch_tokens, set model.gradient_checkpointing=true or "
    "model.quantization=nf4, or lower adapter.r or data.max_length; for cera-eval, lower "
    "generation.batch_tokens."
)

NO_ROOM = "Free some space and repeat the command: a run resumes from its last checkpoint."
NO_ACCESS = (
    "Name another file, or set output_dir and $CERA_TRAIN_CACHE to folders you may write to."
)

FIXES = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EFBIG: "Raise `ulimit -f` and repeat the command.",
    errno.EACCES: NO_ACCESS,
    errno.EROFS: NO_ACCESS,
    errno.ENOTDIR: NO_ACCESS,
    errno.EEXIST: NO_ACCESS,
    errno.ELOOP: NO_ACCESS,
    errno.ENAMETOOLONG: "Shorten it.",
}
"""Errors of the operating system and their fixes."""

LONGEST_REASON = 200  # characters of such an error


class UserError(ValueError):
    """A mistake in settings, files or the environment. The message is one line: the place
    (file:line, row of a file, or key=value), what is wrong, the fix."""

    status = 2  # of the command that it ends


class DiffersError(UserError):
    """What would be deployed is not what was trained."""

    status = 3


@contextlib.contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Prefixes the UserErrors raised inside with a place, unless it is empty."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}" if place else str(error)) from error


@contextlib.contextmanager
def errors_as(problem: str, fix: str) -> Iterator[None]:
    """Turns what a library raises inside, as on a stranger's file, into a UserError. UserErrors
    pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # parsers can raise any exception on arbitrary bytes
        raise UserError(f"{problem}: {error_text(error).rstrip('.')}. {fix}") from error


def error_text(error: BaseException) -> str:
    """The message of an error on one line; for an OSError, without its number and path."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can fix; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    for number, fix in FIXES.items():
        if os.strerror(number) in text:  # safetensors wraps an OSError in an error of its own
            cut = f"{text[:LONGEST_REASON]}..." if len(text) > LONGEST_REASON else text
            return f"{cut}. {fix}"
    is_of_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in text
    if is_of_cpu or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory{'' if is_of_cpu else ' on the GPU'}. {OUT_OF_MEMORY}"
    return None
