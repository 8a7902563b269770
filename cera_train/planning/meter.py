"""Counts the memory and the operations of code that runs on fake tensors, which have shapes, dtypes
and storages and no memory.

Memory is the bytes of all living storages; operations follow from torch's formulas.
"""

import math
import weakref
from collections.abc import Callable
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
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, float] = {}
        self.alive = 0.0
        self.peak = 0.0
        self.flops = 0
        self.supervised = 1  # tokens that the mask of the loss selects: a fake mask has no values
        self.skips_mask = True  # what code reads that asks whether a padding mask masks nothing

    def hold(self, tensor: torch.Tensor, size: float | None = None) -> None:
        """Counts a tensor's storage once, until it is freed.

        Args:
            size: bytes; None for those of the storage.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata  # its address: data_ptr() of a fake storage is 0
        if key in self.sizes:
            return
        size = allocated(storage.nbytes() if size is None else size)
        self.sizes[key] = size
        weakref.finalize(storage, self._free, key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def read(self) -> Reading:
        reading = Reading(self.peak, self.flops)
        self.peak = self.alive
        self.flops = 0
        return reading

    def _free(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is ITEM.default:
            return self.skips_mask if args[0].dtype == torch.bool else 1
        if operation is ATEN.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        if operation is GROUPED_PRODUCT.default:
            output = grouped_output(*args[:3])
        elif operation is ATEN.nonzero.default:
            output = args[0].new_empty((self.supervised, args[0].ndim), dtype=torch.int64)
        else:
            output = operation(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        formula = FORMULAS.get(operation.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output

    def _without_masks(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The indices of an indexing, each mask replaced by the places that it selects."""
        places: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                selected = (self.supervised,)
                places += [index.new_empty(selected, dtype=torch.int64) for _ in index.shape]
            else:
                places.append(index)
        return places


def allocated(size: float) -> int:
    """Bytes that torch's CUDA allocator takes for a request of this size."""
    return 512 * math.ceil(size / 512)


# --- formulas -------------------------------------------------------------------------------------


def for_grouped_heads(formula: Callable, query: int) -> Callable:
    """The formula of an attention kernel in which query heads may share keys and values. torch 2.11
    counts only as many heads of each.

    Args:
        query: the place of the queries among the arguments: [batch, heads, length, width] or
            [tokens, heads, width]. Keys and values follow.
    """

    def flops(*args: Any, **kwargs: Any) -> int:
        heads = args[query].shape[1]
        keys, values = [
            tensor[:, :1].expand(-1, heads, *tensor.shape[2:])
            for tensor in args[query + 1 : query + 3]
        ]
        return formula(*args[: query + 1], keys, values, *args[query + 3 :], **kwargs)

    return flops


def half(formula: Callable) -> Callable:
    """The formula of a causal attention kernel, which skips what the mask takes out."""
    return lambda *args, **kwargs: formula(*args, **kwargs) // 2


def half_if_causal(formula: Callable) -> Callable:
    def flops(*args: Any, **kwargs: Any) -> int:
        is_causal = any(arg is True for arg in args)
        return formula(*args, **kwargs) // (2 if is_causal else 1)

    return flops


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
    GROUPED_PRODUCT: grouped_flops,
    MOE.grouped_mm_fallback: grouped_flops,
}
"""torch's formulas by operation: two operations for a multiply and add."""
SCALED = "_scaled_dot_product_"
for suffix, query in (("", 0), ("_backward", 1)):  # in backward, the output's gradient comes first
    for kernel in ("flash", "efficient", "cudnn"):
        operation = getattr(ATEN, f"{SCALED}{kernel}_attention{suffix}")
        FORMULAS[operation] = for_grouped_heads(flop_registry[operation], query)
    on_gpu = FORMULAS[getattr(ATEN, f"{SCALED}flash_attention{suffix}")]
    on_cpu = getattr(ATEN, f"{SCALED}flash_attention_for_cpu{suffix}")
    FORMULAS[on_cpu] = half_if_causal(on_gpu)
# The kernels that varlen_attn calls: torch 2.11 has no formula for itself.
for operation, kernel, query in (
    (VARLEN._varlen_attn, ATEN._flash_attention_forward, 0),
    (VARLEN._varlen_attn_backward, ATEN._flash_attention_backward, 1),
):
    FORMULAS[operation] = half(for_grouped_heads(flop_registry[kernel], query))
if hasattr(MOE, "grouped_mm_fallback_backward"):  # not in every release
    FORMULAS[MOE.grouped_mm_fallback_backward] = lambda a, b, *args, **kwargs: (
        2 * grouped_flops(a, b)
    )
