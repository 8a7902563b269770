"""The fused Triton branch as a GPU compiles it: the checks that elsewhere run under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: elsewhere tests/cera/test_kernels.py interprets them", allow_module_level=True)

from fused_checks import *  # noqa: F403

pytest_plugins = ["gpu_tests"]
pytestmark = pytest.mark.gpu
