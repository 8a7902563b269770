"""Counts the memory and the operations of code that runs on fake tensors, which have shapes, dtypes
and storages and no memory.

Memory is the bytes of all living storages; operations follow from torch's formulas.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch.nn.attention import varlen  # noqa: F401 - registers _varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe  # noqa: F401 - registers grouped_mm_fallback

ATEN = torch.ops.aten
ITEM = ATEN._local_scalar_dense  # what `.item()` calls
GROUPED_PRODUCT = ATEN._grouped_mm
CPU_ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
VARLEN = torch.ops.torch_attn
MOE = torch.ops.transformers


class Reading(NamedTuple):
    """What was counted since the last reading."""

    peak: float  # bytes
    flops: int


class Meter(TorchDispatchMode):
    """While it is active, `.item()` of a fake tensor returns 1.

    torch's FlopCounterMode hooks modules too, which fails where the loss takes a gradient in its
    forward pass, and its MemTracker fails on frozen weights.

    Args:
        on_gpu: the device whose memory is counted is a GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.sizes: dict[int, float] = {}
        self.alive = 0.0
        self.peak = 0.0
        self.flops = 0

    def hold(self, tensor: torch.Tensor, size: float | None = None) -> None:
        """Counts a tensor's storage once, until it is freed.

        Args:
            size: bytes; None for those of the storage.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata  # its address: data_ptr() of a fake storage is 0
        if key in self.sizes:
            return
        self.sizes[key] = 0
        weakref.finalize(storage, self._free, key)
        self._resize(key, storage.nbytes() if size is None else size)

    def read(self) -> Reading:
        reading = Reading(self.peak, self.flops)
        self.peak = self.alive
        self.flops = 0
        return reading

    def _resize(self, key: int, size: float) -> None:
        self.alive += allocated(size) - self.sizes[key]
        self.sizes[key] = allocated(size)
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is ITEM.default:
            return 1
        if operation is GROUPED_PRODUCT.default:
            output = grouped_output(*args[:3])
        elif operation is ATEN.nonzero.default:  # a fake mask has no values: one place
            output = args[0].new_empty((1, args[0].ndim), dtype=torch.int64)
        else:
            output = operation(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        if operation is ATEN.bernoulli_.float and self.on_gpu:
            # A GPU keeps a dropout mask in bytes, a CPU in numbers of the input's dtype.
            self._resize(output.untyped_storage()._cdata, output.numel())
        formula = FORMULAS.get(operation.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output


def allocated(size: float) -> int:
    """Bytes that torch's CUDA allocator takes for a request of this size."""
    return 512 * math.ceil(size / 512)


# --- formulas: two operations for a multiply and add ----------------------------------------------


def attention_flops(query: torch.Tensor, longest: int, products: int) -> int:
    """Operations of an attention kernel with as many products of [tokens, tokens] and heads, of
    which it skips the half that a causal mask takes out. torch's own formulas count that half, and
    fail for heads that share keys (2.11)."""
    return products * query.numel() * longest


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Operations of a grouped product: [S, in] with [E, in, out], or in backward [in, S] with [S,
    out]."""
    return 2 * a.numel() * b.shape[-1]


def grouped_output(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The output of a grouped product. torch computes it for 32 bits too, but knows its shape for
    bfloat16 alone."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[-1])
    return a.new_empty(len(ends), a.shape[0], b.shape[-1])


FORMULAS = flop_registry | {
    ATEN.addmm_: flop_registry[ATEN.addmm],
    CPU_ATTENTION: lambda query, key, *_, **__: attention_flops(query, key.shape[2], 2),
    # the output's gradient comes first, and the scores are computed again
    CPU_ATTENTION_BACKWARD: lambda _, query, key, *__, **___: attention_flops(
        query, key.shape[2], 5
    ),
    VARLEN._varlen_attn: lambda *args, **_: attention_flops(args[0], args[5], 2),
    VARLEN._varlen_attn_backward: lambda *args, **_: attention_flops(args[1], args[8], 5),
    GROUPED_PRODUCT: grouped_flops,
    MOE.grouped_mm_fallback: grouped_flops,
}
if hasattr(MOE, "grouped_mm_fallback_backward"):  # not in every release
    FORMULAS[MOE.grouped_mm_fallback_backward] = lambda a, b, *args, **kwargs: (
        2 * grouped_flops(a, b)
    )
