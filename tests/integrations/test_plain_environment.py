"""What `pip install cera-train` alone brings is enough for every command."""

import json
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from commands import python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cera_train.common.files import read_json

COMMANDS = (
    "training.train",
    "evaluation.evaluate",
    "serving.chat",
    "serving.export",
    "report.page",
    "planning.estimate",
    "study.page",
)

IMPORT_WITHOUT = """
import importlib, importlib.machinery, json, sys

blocked = {*json.loads(sys.argv[1])}

class PlainPath(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name.partition(".")[0] in blocked:
            path = [entry for entry in sys.path if "_vendor" in entry]  # setuptools' own copies
        return super().find_spec(name, path, target)

sys.meta_path = [PlainPath if each is importlib.machinery.PathFinder else each
                 for each in sys.meta_path]
for name in sys.argv[2:]:
    importlib.import_module(f"cera_train.{name}")
"""


def required(name: str) -> set[str]:
    """A package and those that pip installs with it, without extras that are not asked for."""
    found = set()
    left = [(name, "")]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        for line in map(Requirement, lines):
            if line.marker is None or line.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(line.name), each) for each in ("", *line.extras)]
    return {name for name, _ in found}


@pytest.mark.slow
def test_every_command_loads_without_the_packages_of_the_tests(tmp_path):
    plain = {"pip", "setuptools"} | required("cera-train")
    blocked = [
        module
        for module, packages in packages_distributions().items()
        if not {*map(canonicalize_name, packages)} & plain
    ]
    assert "trl" in blocked
    python("-c", IMPORT_WITHOUT, json.dumps(blocked), *COMMANDS, cwd=tmp_path)


HIDE_LINUX = """
import builtins, os, pathlib, sys

import_module = builtins.__import__

# Libraries know by sys.platform what is there.
def import_for_ours(name, caller=None, *args, **kwargs):
    is_ours = (caller or {}).get("__name__", "").startswith("cera_train")
    if is_ours and name in ("fcntl", "resource"):
        raise ModuleNotFoundError(name)
    return import_module(name, caller, *args, **kwargs)

builtins.__import__ = import_for_ours
del os.sched_getaffinity
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
sys.argv[0] = "cera-train"

from cera_train.cli.start import main
main()
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_linux_alone_has(tiny_folder, tmp_path):
    settings = (
        "data=dates",
        f"model.path={tiny_folder}",
        "train.max_updates=2",
        "data.eval_rows=8",
        "train.batch_size=4",
    )
    python("-c", HIDE_LINUX, *settings, cwd=tmp_path)
    [result] = tmp_path.glob("outputs/*/result.json")
    assert read_json(result)["peak_memory_bytes"] > 0
