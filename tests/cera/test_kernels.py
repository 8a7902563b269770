"""The Triton kernels, and the choice between them and torch's operations."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cera_train.cera import CeraConfig, hidden
from cera_train.cera.hidden import choose_kernels, is_faster

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_kernels_equal_torchs_formula():
    checks = Path(__file__).parents[1] / "helpers" / "kernels_checks.py"
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("gate", ["SiLU", "ReLU", "GELU", "Identity"])
@pytest.mark.parametrize("tensor", ["*fp32", "*bf16"])
def test_kernels_compile_for_a_gpu(gate, tensor, monkeypatch, tmp_path):
    """The interpreter takes Python that the compiler does not, and the compiler needs no GPU: here for an A100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from cera_train.cera import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"p": 0.1, "GATE": gate, "BLOCK": kernels.BLOCK}
    for kernel in (kernels._forward, kernels._backward):
        types = {name: tensor for name in kernel.arg_names if name.endswith("_ptr")} | {"count": "i32", "seed": "i64"}
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        assert compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


def test_a_cpu_computes_by_torch_and_says_so():
    assert choose_kernels(torch.device("cpu"), CeraConfig()) == "no Triton kernels on a CPU"
    assert hidden._fused is None


@without_gpu
def test_what_fails_leaves_torchs_operations_with_a_reason():
    """Without triton, or with it but without what runs its kernels."""
    chosen = choose_kernels(torch.device("cuda"), CeraConfig())
    assert chosen.startswith("no Triton kernels (")
    has_triton = importlib.util.find_spec("triton") is not None
    assert ("CUDA" if has_triton else "triton is not installed") in chosen
    assert "\n" not in chosen
    assert hidden._fused is None


def test_compiled_layers_need_no_kernels():
    chosen = choose_kernels(torch.device("cuda"), CeraConfig(), is_compiled=True)
    assert chosen == "no Triton kernels beside compiled layers"
    assert hidden._fused is None


@needs_gpu
def test_a_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(hidden, "_fused", None)  # and whatever is chosen ends with this test
    chosen = choose_kernels(torch.device("cuda"), CeraConfig())
    assert "ms, torch" in chosen
    assert chosen.startswith("Triton") == (hidden._fused is not None)
    z = torch.randn(7, 5, device="cuda")
    torch.testing.assert_close(hidden.hidden(z, nn.SiLU(), 0.0, 0), nn.functional.silu(z))


def test_faster_means_by_a_tenth_in_the_median():
    assert is_faster([1.0, 1.0, 9.0], than=[2.0, 2.0, 2.0])
    assert not is_faster([0.95, 0.95, 0.95], than=[1.0, 1.0, 1.0])
    assert not is_faster([1.0], than=[1.0])
