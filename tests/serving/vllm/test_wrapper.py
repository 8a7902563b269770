"""The gates between the products of vLLM's wrappers: its operations for CPUs, and its Triton
kernels for GPUs.

Without a GPU the kernels run in Triton's interpreter, in a process of their own.
"""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from commands import python

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import vllm.triton_utils

    # vLLM for CPUs switches Triton off.
    vllm.triton_utils.importing.HAS_TRITON = True
    importlib.reload(vllm.triton_utils)

from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU  # noqa: E402

from cera_train.serving import vllm as plugin  # noqa: E402

if INTERPRETED:
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    # By default 64 programs share a sum of 16384 products: a second for each call, in the
    # interpreter.
    SMALL = {
        "block_m": 16,
        "block_n": 16,
        "block_k": 16,
        "split_k": 2,
        "num_warps": 1,
        "num_stages": 1,
        "num_ctas": 1,
    }
    for kernels in (lora_expand_op, lora_shrink_op):
        kernels.get_lora_op_configs = lambda *arguments, **settings: SMALL

KIND, DTYPE = (
    (PunicaWrapperGPU, torch.float16) if INTERPRETED else (PunicaWrapperCPU, torch.float32)
)
"""The kernels take 16 bits, and the interpreter multiplies no bfloat16."""

SLOTS = 3
R = 16
WIDTH = 32
SLICES = (48, 16, 16)
TOKENS = 6
CERA = (3, 2, 1, 0, 2, 3)
"""The adapter of each token, 0 for none: the first has no gate, the second silu, the third relu."""


def wrapper_of(kind: type):
    config = SimpleNamespace(
        max_loras=SLOTS, max_lora_rank=R, lora_dtype=DTYPE, specialize_active_lora=False
    )
    settings = {"max_batches": 8, "device": "cpu", "lora_config": config}
    wrapper = plugin.gated_wrapper(kind, 16, **settings)
    wrapper.is_cpu = not INTERPRETED
    return wrapper


@pytest.fixture
def wrapper():
    return wrapper_of(KIND)


class Projection:
    """What vLLM computes of q, k and v: three slices, each with an A and a B of every slot."""

    def __init__(self, wrapper) -> None:
        self.wrapper = wrapper
        self.A = tuple(torch.randn(SLOTS, 1, R, WIDTH).to(DTYPE) for _ in SLICES)
        self.B = tuple(torch.randn(SLOTS, 1, out, R).to(DTYPE) / R for out in SLICES)
        self.x = torch.randn(TOKENS, WIDTH).to(DTYPE)

    def load(self, gates: tuple[str, ...]) -> None:
        """Fills the slots."""
        self.wrapper.slot_codes[:SLOTS] = torch.tensor([plugin.GATES.index(name) for name in gates])

    def add(self, y: torch.Tensor) -> torch.Tensor:
        self.wrapper.add_lora_linear(y, self.x, self.A, self.B, 1.0, SLICES)
        return y

    def computed(self, add) -> torch.Tensor:
        return add(torch.zeros(TOKENS, sum(SLICES), dtype=DTYPE)).float()

    def wanted(self, adapters: tuple[int, ...], gates: tuple[str, ...]) -> torch.Tensor:
        """The formula."""
        y = torch.zeros(TOKENS, sum(SLICES))
        for token, adapter in enumerate(adapters):
            if adapter:
                slot = adapter - 1
                zs = [A[slot, 0].float() @ self.x[token].float() for A in self.A]
                parts = zip(self.B, map(plugin.formula(gates[slot]), zs), strict=True)
                y[token] = torch.cat([B[slot, 0].float() @ h for B, h in parts])
        return y


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to one rounding to the dtype of what the kernels multiply."""
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=float(4 * torch.finfo(DTYPE).eps * wanted.abs().max())
    )


def use(wrapper, adapters: tuple[int, ...], is_prefill: bool = True) -> None:
    mapping = LoRAMapping(adapters, adapters, is_prefill=is_prefill)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, WIDTH)


@pytest.mark.skipif(INTERPRETED, reason="is in the interpreter")
def test_the_kernels_of_gpus_pass_the_tests_below():
    options = ["-q", "-W", "default", "-p", "no:cacheprovider"]
    printed = python("-m", "pytest", *options, __file__, TRITON_INTERPRET="1")
    assert "4 passed, 1 skipped" in printed


@pytest.mark.parametrize("is_prefill", [True, False])
def test_each_token_of_a_mixed_batch_gets_its_adapters_gate(wrapper, is_prefill):
    projection = Projection(wrapper)
    gates = ("identity", "silu", "gelu")
    projection.load(gates)
    use(wrapper, CERA, is_prefill)
    assert_close(projection.computed(projection.add), projection.wanted(CERA, gates))


def test_a_graph_traced_on_a_batch_of_lora_serves_cera(wrapper):
    """Codes are data of the graph, not branches: what vLLM traces and captures once serves every
    batch."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    projection = Projection(wrapper)
    compiled = torch.compile(projection.add, fullgraph=True, backend=counter)
    use(wrapper, (1,) * TOKENS, is_prefill=False)
    assert_close(
        projection.computed(compiled), projection.wanted((1,) * TOKENS, ("identity",) * SLOTS)
    )

    gates = ("identity", "silu", "relu")
    projection.load(gates)
    use(wrapper, CERA, is_prefill=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(projection.computed(compiled), projection.wanted(CERA, gates))
    assert counter.frame_count == 1


def test_a_wrapper_that_bypasses_the_gate_is_detected():
    class Fused(KIND):
        def add_lora_linear(
            self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more
        ):
            y += x @ lora_a_stacked[0][0, 0].T @ lora_b_stacked[0][0, 0].T

    assert [
        name for code, name in enumerate(plugin.GATES) if plugin.computes(wrapper_of(Fused), code)
    ] == ["identity"]
