"""Attention over sequences that lie end to end in one row: each is one block, and no T x T mask is
made.

Registered with transformers by name: `model.set_attn_implementation(BY_SEQUENCE)`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from cera_train.cera.layer import autocast_dtype

BY_SEQUENCE = "by_sequence"
"""One sequence after the other by scaled_dot_product_attention: on every device, in every dtype."""
# all sequences in one call of FlashAttention's variable-length kernel: on CUDA, in 16 bits
VARLEN = "varlen"


def attention_of(config: PretrainedConfig) -> str:
    """The name of the attention that a model is set to."""
    # transformers sets it by set_attn_implementation(), and has no other way to read it.
    return config._attn_implementation


class Sequences:
    """The sequences of a flat row, one object for all layers. torch.compile guards on the class of
    such an argument, but on the length of a list: with a list of lengths, every new number of
    sequences would compile the layers again."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self._starts: Tensor | None = None

    def starts(self, device: torch.device) -> Tensor:
        """Where each sequence starts, and where the last one ends: [sequences + 1]."""
        if self._starts is None:
            self._starts = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(device)
        return self._starts


@torch.compiler.disable  # otherwise sequences of other lengths would need another graph
def attend_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequences,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    in_one_call: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a row: [1, heads, T, d] -> [1, T, heads, d], and no
    weights. Key and value may have fewer heads.

    Args:
        in_one_call: uses FlashAttention's variable-length kernel, unless there is dropout, which it
            lacks.

    Raises:
        NotImplementedError: the model's attention needs more than that (biases, sinks, soft caps,
            both directions). RuntimeError, ImportError, TypeError: the kernel does not support this
            device, dtype, head width or torch.
    """
    _refuse_more(module, attention_mask, sliding_window, settings)
    if in_one_call and not dropout:
        return _in_one_call(query, key, value, sequences, scaling, sliding_window), None
    cut = [heads.split(sequences.lengths, dim=2) for heads in (query, key, value)]
    outputs = [_attend(*one, scaling, dropout, sliding_window) for one in zip(*cut, strict=True)]
    return torch.cat(outputs, dim=1), None


attend_varlen = functools.partial(attend_by_sequence, in_one_call=True)


def _refuse_more(
    module: nn.Module, mask: Tensor | None, window: int | None, settings: dict[str, Any]
) -> None:
    more = [
        name for name in ("position_bias", "softcap", "s_aux") if settings.get(name) is not None
    ]
    is_causal = module.is_causal if settings.get("is_causal") is None else settings["is_causal"]
    if not is_causal:
        more.append("both ways")
    if mask is not None:
        more.append("a mask")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if kinds and kinds[module.layer_idx] != (
        "full_attention" if window is None else "sliding_attention"
    ):
        # This kind exists only in its mask, and transformers makes no mask for our names.
        more.append(kinds[module.layer_idx])
    if more:
        raise NotImplementedError(f"this attention is more than causal ({', '.join(more)}).")


def kernel_may_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to try the kernel: it checks the rest, such as compute capability 8.0, by itself."""
    return device.type == "cuda" and dtype.itemsize == 2


def _in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All sequences: [1, heads, T, d] -> [1, T, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn

    starts = sequences.starts(query.device)
    longest = max(sequences.lengths)
    # Autocast does not cover the kernel, and norms between projection and attention leave float32.
    dtype = autocast_dtype(query.device) or query.dtype
    output = varlen_attn(
        # [T, heads, d]
        *(heads.squeeze(0).transpose(0, 1).to(dtype) for heads in (query, key, value)),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        # tokens before and after a query's own
        window_size=(-1 if window is None else window - 1, 0),
        **_grouping(varlen_attn),
    )
    return output.unsqueeze(0)


@functools.cache
def _grouping(kernel: Callable) -> dict[str, bool]:
    """The argument that lets query heads share a key head: torch 2.11's kernel has none, and
    shares."""
    takes_it = "enable_gqa" in inspect.signature(kernel).parameters
    return {"enable_gqa": True} if takes_it else {}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One sequence: [1, heads, T, d] -> [1, T, heads, d]."""
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        everything = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = everything.tril() & everything.triu(1 - window)
    output = scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
AttentionInterface.register(VARLEN, attend_varlen)
