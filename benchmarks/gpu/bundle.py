"""One folder for a GPU machine that reaches no network, from a machine that does.

    make gpu-bundle                         # bundle/, to be copied there
    bundle/run.sh --minutes 30              # there: python3 -m benchmarks.gpu

The image there has IMAGE and what these require. The folder holds run.sh and an archive: the
packages that such an image lacks, without builds for other machines; the project; and a tokenizer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.pieces import ROOT
from benchmarks.gpu.work import TOKENIZER
from benchmarks.training import PACKAGE
from cera_train.model.folder import load_tokenizer
from cera_train.settings.model import ModelConfig

IMAGE = ("torch==2.11.0", "transformers==5.17.0", "accelerate==1.15.0")
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_28"
FOR_IMAGE = ("--quiet", "--python-version", PYTHON, "--python-platform", PLATFORM)
PACKAGES = (
    "bitsandbytes",
    "datasets",
    "hydra-core",
    "liger-kernel",
    "peft",
    "pebble",
    "pyarrow",
    "pytest",
    "trl",
)
"""What the pieces import."""
UNUSED = (
    "bitsandbytes/libbitsandbytes_rocm*",
    "bitsandbytes/libbitsandbytes_xpu*",
    "bitsandbytes/libbitsandbytes_cuda1[12]*",
    "bitsandbytes/libbitsandbytes_cuda132*",
    "pandas/tests",
    "pyarrow/include",
    "pyarrow/tests",
    "pyarrow/*flight*",
    "pyarrow/*s3*",
)
"""Builds for other machines, and what no piece imports."""
PROJECT = ("cera_train", "conf", "recipes", "benchmarks", "tests", "pyproject.toml")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as parts:
        contents = Path(parts) / "contents"
        # dill, which datasets uses, takes modules outside a folder of this name for the user's own.
        install_packages(contents / "site-packages")
        copy_project(contents / "project")
        tokenizer = load_tokenizer(ModelConfig(path=PACKAGE))
        tokenizer.save_pretrained(contents / "project" / TOKENIZER.name)
        with tarfile.open(folder / "contents.tar.xz", "w:xz") as archive:
            archive.add(contents, "contents")
    shutil.copy(Path(__file__).with_name("run.sh"), folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def install_packages(folder: Path) -> None:
    """Those of PACKAGES and of what they require that the image lacks."""
    there = resolve(IMAGE).keys()
    needed = [line for name, line in resolve([*IMAGE, *PACKAGES]).items() if name not in there]
    print("packages:", *needed, flush=True)
    uv("pip", "install", *FOR_IMAGE, "--target", str(folder), "--no-deps", *needed)
    for pattern in UNUSED:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def resolve(requirements: Sequence[str]) -> dict[str, str]:
    """name==version of all that these require, by name."""
    compiled = uv(
        "pip",
        "compile",
        "--no-header",
        "--no-annotate",
        *FOR_IMAGE,
        "-",
        given="\n".join(requirements),
    )
    lines = [line for line in compiled.splitlines() if "==" in line]
    return {line.partition("==")[0]: line for line in lines}


def uv(*arguments: str, given: str = "") -> str:
    command = [str(Path(sys.executable).with_name("uv")), *arguments]
    return subprocess.run(
        command, input=given, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def copy_project(folder: Path) -> None:
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)


if __name__ == "__main__":
    main()
