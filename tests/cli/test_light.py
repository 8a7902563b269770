"""What has to answer at once imports nothing heavy, and every setting carries its mark."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
import typing

import pytest

import cera_train
from cera_train.common.settings import Changes, section_of

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")
FOLDERS = ("cli", "sweep", "report", "settings", "common")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cera_train.__path__, "cera_train.")
    if module.name.split(".")[1] in FOLDERS
)

IMPORT_ALL = """
import importlib, sys
sys.argv[0] = "cera-train"
for name in {modules}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "submitit" and name == "cera_train.cli.cluster", error
    print(name, *sorted(set({heavy}) & sys.modules.keys()))
"""


def printed(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_answers_at_once_imports_nothing_heavy():
    assert {"cera_train.settings.run", "cera_train.cli.train", "cera_train.report.page"} <= {*MODULES}
    assert printed(IMPORT_ALL.format(modules=MODULES, heavy=HEAVY)).split("\n")[:-1] == MODULES


@pytest.mark.slow
def test_importing_the_package_registers_cera_with_peft_whichever_comes_first():
    for first, second in (("cera_train", "peft"), ("peft", "cera_train")):
        script = f"import {first}, {second}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        script += "import sys; print('CERA' in [kind.value for kind in known])\n"
        script += "print([type(finder) for finder in sys.meta_path if 'cera' in str(type(finder)).lower()])"
        assert printed(script) == "True\n[]\n"


@pytest.mark.slow
def test_an_evaluation_and_a_run_register_cera_where_they_load_torch():
    for module in ("cera_train.evaluation.evaluate", "cera_train.training.train"):
        script = f"import sys; sys.argv[0] = 'cera-train'; import {module}; print('cera_train.cera' in sys.modules)"
        assert printed(script) == "True\n", module


def test_every_setting_carries_the_mark_of_what_it_changes():
    """Resuming, the token cache, sweeps and reports go by it: a field without one would be forgotten by all."""
    modules = [importlib.import_module(name) for name in MODULES if name.startswith("cera_train.settings.")]
    kinds = {kind for module in modules for kind in vars(module).values() if dataclasses.is_dataclass(kind)}
    assert len(kinds) >= 15
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if section_of(typing.get_type_hints(kind)[field.name]) is None:
                assert field.metadata.get("changes") in set(Changes), f"{kind.__name__}.{field.name}: use setting(...)"
            else:
                assert not field.metadata, f"{kind.__name__}.{field.name}: use section(...)"
