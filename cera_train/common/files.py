"""Files and folders that appear whole or not at all: written under another name, flushed to the
disk and renamed. Their checksums reveal damage. Also the folders of configs and caches."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from cera_train.common.errors import UserError, error_text, errors_as
from cera_train.common.settings import map_values

WRITING = ".writing-"  # prefix of files and folders that are still being written
OLD = f"{WRITING}old-"  # prefix of a folder that is about to be replaced
# seconds that a writer waits for a lock, which another process's `is_locked` holds for an instant
LOOK_SECONDS = 0.2
LONGEST_NAME = 100  # bytes
CHECKSUMS = "checksums.json"  # the SHA-256 of every other file of its folder


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    # Two processes may write the same file.
    part = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    part.unlink(missing_ok=True)
    try:
        # Always a new file: writing through a link of that name would land elsewhere.
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def cut_name(name: str) -> str:
    """The start of a name, short enough for a file or a folder: a file system takes 255 bytes."""
    return name.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore")


def finite(tree: Any) -> Any:
    """Replaces infinity and NaN, which JSON lacks, by null in nested dicts and lists."""
    return map_values(lambda number: number if math.isfinite(number) else None, tree, float)


def read_json(path: Path, fix: str = "Restore it.") -> dict[str, Any]:
    """Reads a JSON object; raises UserError with the fix for anything else."""
    return read_parsed(path, json.loads, fix)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a config as plain values, without resolving or running anything; raises UserError for
    anything else."""
    return read_parsed(path, yaml.safe_load, "Restore it.")


def read_parsed(path: Path, parse: Callable[[bytes], Any], fix: str) -> dict[str, Any]:
    """Reads names and values; raises UserError with the fix for anything else."""
    with errors_as(f"{path} is broken", fix):
        tree = parse(path.read_bytes())
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} is broken: expected names and values, got {type(tree).__name__}. {fix}"
        )
    return tree


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder by `write` and moves it to `path`. If `write` fails, nothing is left."""
    part = path.with_name(WRITING + path.name)
    old = path.with_name(OLD + path.name)
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    # By the umask: safetensors makes files readable to the owner only.
    mode = part.stat().st_mode & 0o666
    for file in filter(Path.is_file, part.rglob("*")):
        file.chmod(mode)
        sync(file)
    sync(part)
    if path.exists():
        path.rename(old)  # killed between these two lines, it leaves no `path`: see clean_folder
    part.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_folder(path: Path) -> None:
    """Removes what interrupted writes left in a folder, and restores a folder that they moved
    aside."""
    for old in path.glob(f"{OLD}*"):
        if not (replaced := path / old.name.removeprefix(OLD)).exists():
            old.rename(replaced)
    for leftover in path.glob(f"{WRITING}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_folder(path: Path) -> None:
    """Removes a folder. Interrupted, it leaves nothing that looks whole."""
    part = path.with_name(WRITING + path.name)
    path.rename(part)
    shutil.rmtree(part)


def write_checksums(folder: Path) -> None:
    """Writes the checksum of every file in a folder, for `find_damage`."""
    sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def find_damage(folder: Path) -> str | None:
    """The first file whose checksum differs, and why; None if all agree, or there are no
    checksums."""
    checked = CHECKSUMS
    if not (folder / checked).exists():
        return None
    try:
        sums = read_json(folder / checked)
        for checked, written in sums.items():
            if checked != Path(checked).name or sha256_of(folder / checked) != written:
                return f"{checked}: checksum differs"
    except (OSError, ValueError) as error:
        return f"{checked}: {error_text(error)}"
    return None


SAMPLE = 1024  # bytes of a tensor that are read at each of four places


def sampled_digest(files: Iterable[Path]) -> str:
    """A digest of the tensors in safetensors files: their names, types, shapes and 4 KiB of each.
    Equal however they are divided into files. Raises UserError for a damaged file."""
    samples = {}
    for path in files:
        with errors_as(f"{path} is damaged", "Restore it."):
            samples |= _sample(path)
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:16]


def _sample(path: Path) -> dict[str, str]:
    """A digest of each tensor of a safetensors file."""
    samples = {}
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(min(length, path.stat().st_size)))
        tensors.pop("__metadata__", None)
        for name, tensor in tensors.items():
            begin, end = tensor["data_offsets"]
            digest = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
            for place in range(4):
                file.seek(8 + length + begin + place * max(0, end - begin - SAMPLE) // 3)
                digest.update(file.read(min(SAMPLE, end - begin)))
            samples[name] = digest.hexdigest()
    return samples


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(
    path: Path, writer: str, has_content: Callable[[], bool] = lambda: True
) -> Iterator[Callable[[], None]]:
    """Creates a folder if needed, and locks it by a file `.lock` in it; raises UserError if another
    writer holds it. Yields a check that raises UserError where the path no longer leads to the
    folder: it was renamed or removed, and writing would begin another.

    Args:
        writer: the kind of writer, for messages: a run, an evaluation.
        has_content: whether a folder that was created here has content. Without any, as after a
            mistake, it is removed.
    """
    lock = FileLock(path / ".lock")
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOOK_SECONDS)
    except Timeout:
        raise folder_in_use(path, writer) from None
    held = os.open(path, os.O_RDONLY)  # while it is open, no new folder gets its number

    def check() -> None:
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(held))):
            raise UserError(
                f"{path} was renamed or removed while this {writer} wrote to it. Move it back, and "
                "the same command resumes it."
            )

    try:
        yield check
    finally:
        # If the disk or the folder is gone, the error that stopped the writer is raised.
        with contextlib.suppress(OSError, UserError):
            check()
            if is_new and not has_content():
                shutil.rmtree(path)
            else:
                (path / ".lock").unlink()  # before the release: the next writer creates a new file
        os.close(held)
        lock.release()


def folder_in_use(path: Path, writer: str) -> UserError:
    """The error for a folder that a writer holds."""
    return UserError(
        f"another {writer} is writing to {path}: wait for it, or choose another name=..."
    )


def is_locked(path: Path) -> bool:
    """Whether a writer holds a folder. The lock file exists while it does, or after it was
    killed."""
    file = path / ".lock"
    if not file.exists():
        return False
    try:
        with FileLock(file).acquire(timeout=LOOK_SECONDS):
            return False
    except OSError:  # held, or owned by another user
        return True


def config_dir(name: str) -> Path:
    """conf/ or recipes/: inside the package if a wheel was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def options(group: str) -> list[str]:
    """The choices of a config group."""
    folder = config_dir("recipes") if group == "recipe" else config_dir("conf") / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def cache_dir() -> Path:
    """Folder of tokenised rows and converted weights: $CERA_TRAIN_CACHE, else the user's cache
    folder."""
    if ours := os.environ.get("CERA_TRAIN_CACHE"):
        return Path(ours)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cera-train"


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `write` the first time. Only one of several processes fills
    it."""
    folder = cache_dir() / name
    if folder.is_dir():  # complete, and readable even on a read-only file system
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_folder(folder, write)
    return folder
