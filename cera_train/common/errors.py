"""`UserError`, and one line for every error that a user can fix. Any other error is a bug and
keeps its traceback."""

import contextlib
import errno
import os
from collections.abc import Iterator

OUT_OF_MEMORY = (
    "out of memory{where}. Lower train.micro_batch_tokens, set model.gradient_checkpointing=true "
    "or "
    "model.quantization=nf4, or lower adapter.r or data.max_length; for cera-eval, lower "
    "generation.batch_tokens."
)

LIMITS = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk is full", "Free some space"),
    errno.EFBIG: ("the file has reached its size limit", "Raise `ulimit -f`"),
}
"""Errno of the operating system -> the problem and its fix."""


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


def error_text(error: BaseException) -> str:
    """The message of an error; for an OSError, without its number and path."""
    return getattr(error, "strerror", None) or str(error)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can fix; None for any other."""
    text = " ".join(str(error).split())
    for number, (what, fix) in LIMITS.items():
        if os.strerror(number) in text:  # safetensors wraps an OSError in an error of its own
            return (
                f"{what} ({text}). {fix} and repeat the command: a run resumes from its last "
                f"checkpoint."
            )
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EROFS,
        errno.ENOTDIR,
        errno.ELOOP,
    ):
        fix = (
            "Name another file, or set output_dir and $CERA_TRAIN_CACHE to folders you may write "
            "to."
        )
        return f"no access to {error.filename}: {error.strerror}. {fix}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return (
            f"{str(error.filename)[:40]}...: too long for the name of a file or folder. Shorten it."
        )
    if type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY.format(where=" on the GPU")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return OUT_OF_MEMORY.format(where="")
    return text if isinstance(error, UserError) else None
