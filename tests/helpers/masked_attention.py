"""Attention over one row of several sequences under a block mask, which attention by sequence must equal."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Causal(nn.Module):
    """Stands for the attention module of a decoder."""

    is_causal = True


def under_a_mask(query, key, value, lengths: list[int], window: int | None = None) -> torch.Tensor:
    """Query, key and value are (1, heads, tokens, width); the result is (1, tokens, heads, width)."""
    mask, start = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool, device=query.device), 0
    for length in lengths:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask[start : start + length, start : start + length] = ones.triu(1 - window) if window else ones
        start += length
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
