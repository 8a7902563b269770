"""A pytest plugin for tests of a CUDA device. They skip without one; CERA_TRAIN_GPU_TESTS=cpu runs what a CPU has too,
which is how the tests themselves are tested."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.pieces import DEVICE

HERE = Path(__file__).parents[1] / "gpu"
CHOSEN = os.environ.get(DEVICE, "cuda")


def pytest_collection_modifyitems(items) -> None:
    """A warning of a library that no CPU shows is no failure here."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
            if CHOSEN == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(CHOSEN)


@pytest.fixture
def cuda(device) -> torch.device:
    """For what a CPU does not have."""
    if device.type != "cuda":
        pytest.skip("a CPU has no such thing")
    return device


@pytest.fixture
def bf16(device) -> None:
    """For what multiplies bf16."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
