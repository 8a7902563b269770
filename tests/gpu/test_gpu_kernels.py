"""The Triton kernels as a GPU compiles them: the checks that elsewhere run under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: elsewhere tests/cera/test_kernels.py interprets them", allow_module_level=True)
from kernels_checks import *  # noqa: F403

from cera_train.cera import hidden

pytest_plugins = ["gpu_tests"]
pytestmark = pytest.mark.gpu


def test_a_run_here_computes_by_triton():
    assert hidden.choose_kernels("auto", torch.device("cuda")) == "triton"
    z = torch.randn(7, 5, device="cuda")
    by_triton = hidden.hidden(z, torch.nn.SiLU(), 0.0, 0, kernels="triton")
    torch.testing.assert_close(by_triton, torch.nn.functional.silu(z))
