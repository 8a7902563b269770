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
from cera_train.cera import CeraConfig, CeraLayer, for_inference, hidden
from cera_train.cera.config import ACTIVATIONS
from cera_train.cera.hidden import choose_kernels
from cera_train.common.errors import UserError
from cera_train.settings.adapters import Activation, AdapterConfig, AdapterKind, Kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@pytest.mark.provable
@needs_triton
def test_kernels_equal_torchs_formula():
    helpers = Path(__file__).parents[1] / "helpers"
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    files = [helpers / name for name in ("kernels_checks.py", "fused_checks.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SHARED_MEMORY = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227}
"""KB that a block of threads may have, by architecture (CUDA programming guide, technical specifications)."""

ITEMSIZE = {"*fp32": 4, "*bf16": 2, "*fp16": 2}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """compiled(kernel, architecture, tensor, constants): as a launch has it compiled, for sides that 16 divides or, not
    `is_even`, for others. The interpreter takes Python that the compiler does not, and the compiler needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_for(kernel, architecture, tensor, constants, is_even=True):
        options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        numbers = {"seed": "i64", "scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
        types = {name: tensor if name.endswith("_ptr") else numbers.get(name, "i32") for name in kernel.arg_names}
        sides = ("d_in", "d_out", "r", "share") if is_even else ()
        divisible = [name.endswith("_ptr") or name in sides for name in types]
        hints = {(place,): [["tt.divisibility", 16]] for place, divides in enumerate(divisible) if divides}
        source = ASTSource(kernel, types, constants, hints)
        return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    return compile_for


GATE_NAMES = [gate.__name__ for gate in hidden.GATES.values()]

COMPILED = [
    pytest.param(architecture, tensor, gate, marks=[] if (architecture, tensor, gate) == fast else pytest.mark.slow)
    for fast in [(90, "*bf16", "SiLU")]
    for architecture in (80, 90, 100)
    for tensor in ITEMSIZE
    for gate in GATE_NAMES
    if architecture == 80 or tensor == "*bf16" or gate == "SiLU"  # all pairs on one: a compilation takes a second
]


@pytest.mark.provable
@needs_triton
@pytest.mark.parametrize(("architecture", "tensor", "gate"), COMPILED)
def test_kernels_compile_for_a_gpu(architecture, tensor, gate, compiled):
    from cera_train.cera import fused, kernels

    constants = {"p": 0.1, "GATE": gate}
    for kernel in (kernels._forward, kernels._backward):
        assert compiled(kernel, architecture, tensor, constants | {"BLOCK": kernels.BLOCK}).asm["cubin"]
    constants |= fused.tiling(16, ITEMSIZE[tensor]) | {"HAS_Z": True, "HAS_GRAD_X": True}
    for kernel in (fused._forward, fused._backward):
        assert compiled(kernel, architecture, tensor, constants).asm["cubin"]


@pytest.mark.slow
@pytest.mark.provable
@needs_triton
@pytest.mark.parametrize(("architecture", "is_even"), [(80, True), (90, True), (100, True), (90, False)])
def test_the_largest_rank_fits_into_shared_memory(architecture, is_even, compiled):
    from cera_train.cera import fused

    constants = {"p": 0.0, "GATE": "Identity", "HAS_Z": False, "HAS_GRAD_X": True}
    for kernel, tensor in ((fused._forward, "*fp32"), (fused._forward, "*bf16"), (fused._backward, "*bf16")):
        tiles = fused.tiling(fused.LARGEST_R, ITEMSIZE[tensor])
        taken = compiled(kernel, architecture, tensor, constants | tiles, is_even).metadata.shared
        assert taken <= fused.shared_bytes(fused.LARGEST_R) <= SHARED_MEMORY[architecture] * 1024


@needs_triton
@pytest.mark.parametrize(
    ("settings", "is_fused"),
    [
        ({}, True),
        ({"r": 129}, False),
        ({"mix": "learned"}, False),
        ({"dropout_on": "input", "dropout": 0.1}, False),
        ({"dropout_on": "input", "dropout": 0.0}, True),
    ],
)
def test_a_layer_is_fused_where_one_kernel_computes_its_branch(settings, is_fused, monkeypatch):
    from cera_train.cera import fused

    layer = CeraLayer(nn.Linear(6, 5), "default", CeraConfig(**{"r": 3} | settings))
    monkeypatch.setattr(fused, "shared_memory", lambda index: SHARED_MEMORY[80] * 1024)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layer.kernels = "triton"
    assert not layer.is_fused("default")  # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert layer.is_fused("default") == is_fused
    layer.kernels = "torch"
    assert not layer.is_fused("default")


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


def test_every_list_of_gates_is_the_methods():
    gates = {"silu", "relu", "gelu", "identity"}
    assert set(ACTIVATIONS) == set(hidden.GATES) == {str(gate) for gate in Activation} == gates
    text = (Path(cera_train.cera.__file__).parent / "kernels.py").read_text()
    assert all(f'"{module.__name__}"' in text for module in hidden.GATES.values())


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


def test_inference_computes_every_call_alike(monkeypatch):
    """The first call prepares what the next ones use, which is not the fused kernel."""
    layer, x = CeraLayer(nn.Linear(6, 5), "default", CeraConfig(r=3, init_weights=False)).eval(), torch.randn(4, 6)
    layer.kernels = "triton"
    monkeypatch.setattr(cera_train.cera.layer, "fits_one_kernel", lambda x, r, gate: pytest.fail("fused"))
    with torch.no_grad(), for_inference(layer):
        assert torch.equal(layer(x), layer(x))


def test_a_run_prints_what_triton_computes(monkeypatch):
    """A layer of too large a rank computes its gate and dropout alone."""
    rank_pattern = {"rank_pattern": {"v_proj": 200}}
    model = build.build(
        make_tiny_llama(), AdapterConfig(r=4, target_modules=["q_proj", "v_proj"], settings=rank_pattern)
    )
    assert build.describe_kernels(model) == ""
    build.use_kernels(model, "triton")
    assert build.describe_kernels(model) == "Triton kernels for gate and dropout"  # on a CPU nothing fits
    monkeypatch.setattr(cera_train.cera.layer, "fits_one_kernel", lambda x, r, gate: r <= 128)
    fused = "the branch of 2 of 4 layers in one Triton kernel, else Triton kernels for gate and dropout"
    assert build.describe_kernels(model) == fused
    monkeypatch.setattr(cera_train.cera.layer, "fits_one_kernel", lambda x, r, gate: True)
    assert build.describe_kernels(model) == "the branch in one Triton kernel"


@needs_gpu
@needs_triton
def test_a_gpu_computes_by_triton():
    assert choose_kernels("auto", GPU) == "triton"
    z = torch.randn(7, 5, device="cuda")
    torch.testing.assert_close(hidden.hidden(z, nn.SiLU(), 0.0, 0, kernels="triton"), nn.functional.silu(z))
