"""Tests of a CUDA device skip without one; CERA_TRAIN_GPU_TESTS=cpu runs what a CPU has too, which
is how these tests themselves are tested."""

import os

import pytest
import torch

from benchmarks.gpu.pieces import DEVICE

CHOSEN = os.environ.get(DEVICE, "cuda")


def pytest_collection_modifyitems(items) -> None:
    """A warning of a library that no CPU shows is no failure here."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if CHOSEN == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(CHOSEN)


@pytest.fixture
def bf16(device) -> None:
    """For what multiplies bf16."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
