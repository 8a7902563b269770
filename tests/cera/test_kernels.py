"""The Triton kernels, and the choice between them and torch's operations."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from torch import nn

import cera_train.cera
from cera_train.adapters import build
from cera_train.adapters.config import Activation, AdapterConfig, AdapterKind, Kernels
from cera_train.cera import CeraLayer, hidden
from cera_train.cera.config import ACTIVATIONS
from cera_train.cera.hidden import choose_kernels
from cera_train.common.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@pytest.mark.provable
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


@pytest.mark.provable
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


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def with_triton(monkeypatch):
    """A machine on which Triton can build kernels, as far as the choice looks."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def test_auto_follows_the_device(with_triton):
    assert choose_kernels("auto", CPU) == "torch"
    assert choose_kernels("auto", GPU) == "triton"
    assert choose_kernels("auto", GPU, is_compiled=True) == "torch"
    assert choose_kernels("torch", GPU) == "torch"
    assert choose_kernels("triton", GPU) == "triton"


@pytest.mark.parametrize(
    ("device", "is_compiled", "message"),
    [(CPU, False, "need a GPU, and this is cpu"), (GPU, True, "compiled layers never call Triton kernels")],
)
def test_triton_is_refused_where_it_cannot_run(with_triton, device, is_compiled, message):
    with pytest.raises(ValueError, match=message):
        choose_kernels("triton", device, is_compiled)


def test_a_machine_without_triton_computes_by_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_kernels("auto", GPU) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        choose_kernels("triton", GPU)


def test_a_machine_without_a_compiler_computes_by_torch(with_triton, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_kernels("auto", GPU) == "torch"
    with pytest.raises(ValueError, match="needs a C compiler"):
        choose_kernels("triton", GPU)


def test_every_list_of_gates_is_the_methods():
    gates = {"silu", "relu", "gelu", "identity"}
    assert set(ACTIVATIONS) == set(hidden.GATES) == {str(gate) for gate in Activation} == gates
    text = (Path(cera_train.cera.__file__).parent / "kernels.py").read_text()
    assert all(f'"{module.__name__}"' in text for module in hidden.GATES.values())


def test_a_tensor_that_triton_cannot_take_goes_to_torch():
    z = torch.randn(7, 5, dtype=torch.float64)
    by_torch = hidden.hidden(z, nn.SiLU(), 0.3, 5)
    assert torch.equal(hidden.hidden(z, nn.SiLU(), 0.3, 5, kernels="triton"), by_torch)


def test_kernels_are_a_choice_for_a_model_and_reach_no_file(tmp_path):
    one, other = (build.build(make_tiny_llama(), AdapterConfig(r=4)) for _ in range(2))
    build.use_kernels(one, "triton")
    assert {layer.kernels for layer in one.modules() if isinstance(layer, CeraLayer)} == {"triton"}
    assert {layer.kernels for layer in other.modules() if isinstance(layer, CeraLayer)} == {"torch"}
    one.save_pretrained(tmp_path)
    assert "triton" not in (tmp_path / "adapter_config.json").read_text()


def test_triton_on_a_cpu_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^adapter.kernels=triton: .*Set adapter.kernels=auto or torch\.$"):
        build.choose_kernels(AdapterConfig(kernels=Kernels.triton), CPU)
    assert build.choose_kernels(AdapterConfig(), CPU) == "torch"
    assert build.choose_kernels(AdapterConfig(AdapterKind.lora), GPU) == "auto"  # LoRA has no gate


@needs_gpu
@needs_triton
def test_a_gpu_computes_by_triton():
    assert choose_kernels("auto", GPU) == "triton"
    z = torch.randn(7, 5, device="cuda")
    torch.testing.assert_close(hidden.hidden(z, nn.SiLU(), 0.0, 0, kernels="triton"), nn.functional.silu(z))
