"""Mistakes in the adapter that a server loads, as changes of its folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_files import write_json
from safetensors.torch import load_file, save_file

from cera_train.common.files import read_json
from cera_train.evaluation.server import Server

Change = Callable[[Path], None]


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    config = read_json(file)
    write_json(file, config | {k: v for k, v in changes.items() if k in config})


def scale(folder: Path, factor: float) -> None:
    config = read_json(folder / "adapter_config.json")
    set_config(folder, alpha=factor * config["alpha"])


def drop(folder: Path, is_dropped: Callable[[str], bool]) -> None:
    """Without effect are the projections of these names."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if "_B." in name and is_dropped(name):
            tensor.zero_()
    save_file(weights, file)


class Stale:
    """Each load gets the adapter of the load before."""

    def __init__(self) -> None:
        self.before = None

    def __call__(self, folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        newest = file.read_bytes()
        if self.before is not None:
            file.write_bytes(self.before)
        self.before = newest


WRONG_ADAPTERS: dict[str, Change] = {
    "no adapter": lambda folder: drop(folder, lambda name: True),
    "half the scale": lambda folder: scale(folder, 0.5),
    "rsLoRA's scale": lambda folder: set_config(folder, use_rslora=True),
    "no gate": lambda folder: set_config(folder, activation="identity"),
    "half the modules": lambda folder: drop(folder, lambda name: ".mlp." in name),
    "half the layers": lambda folder: drop(folder, lambda name: ".layers.1." in name),
}
"""For two layers of CeRA."""


@contextmanager
def changed_adapters(change: Change) -> Iterator[None]:
    """Servers load changed copies of the adapters that they are to load."""
    load_adapter = Server.load_adapter

    def load_changed(server: Server, adapter: Path) -> None:
        copy = adapter.with_name("changed")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(adapter, copy)
        change(copy)
        load_adapter(server, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "load_adapter", load_changed)
        yield
