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
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
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

    @functools.cached_property
    def blocks(self) -> list[list[int]]:
        """The lengths, cut into neighbours that attention may pad to the longest of them."""
        return near_equal_neighbours(self.lengths)

    def starts(self, device: torch.device) -> Tensor:
        """Where each sequence starts, and where the last one ends: [sequences + 1]."""
        if self._starts is None:
            self._starts = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(device)
        return self._starts


LONGEST_TOGETHER = 128
"""Tokens of a sequence that shares a block: longer ones are as fast alone."""
MOST_PADDING = 0.2
"""Share of a block's tokens that may be padding."""
MOST_SCORES = 256**2
"""Scores of a block and head: more no longer fit a CPU's caches."""


def near_equal_neighbours(lengths: Sequence[int]) -> list[list[int]]:
    """Cuts lengths into blocks of neighbours, each as long as MOST_PADDING and MOST_SCORES
    allow. Longer ones than LONGEST_TOGETHER stay alone."""
    blocks: list[list[int]] = []
    for length in lengths:
        block = [*blocks[-1], length] if blocks else [length]
        tokens = len(block) * max(block)  # padding included
        is_near_equal = sum(block) >= (1 - MOST_PADDING) * tokens
        is_short = max(block) <= LONGEST_TOGETHER and tokens * max(block) <= MOST_SCORES
        if blocks and is_near_equal and is_short:
            blocks[-1] = block
        else:
            blocks.append([length])
    return blocks


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
    blocks = sequences.blocks
    cut = [sum(block) for block in blocks]
    parts = zip(*(heads.split(cut, dim=2) for heads in (query, key, value)), strict=True)
    outputs = [
        _attend(*part, block, scaling, dropout, sliding_window)
        for part, block in zip(parts, blocks, strict=True)
    ]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


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
    lengths: list[int],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """A block of sequences: [1, heads, T, d] -> [1, T, heads, d]."""
    longest = max(lengths)
    is_whole = window is None or longest <= window
    if is_whole and not dropout and ShortAttention.is_faster(query, key, value, longest):
        return ShortAttention.apply(query, key, value, lengths, scaling or query.shape[-1] ** -0.5)
    outputs = []
    for one in zip(*(heads.split(lengths, dim=2) for heads in (query, key, value)), strict=True):
        length = one[0].shape[2]
        mask = None
        if window is not None and length > window:
            everything = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = everything.tril() & everything.triu(1 - window)
        output = scaled_dot_product_attention(
            *one, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


class ShortAttention(torch.autograd.Function):
    """Causal attention of sequences of near-equal length, in a few operations on
    [sequences x heads, L, L]: on a CPU in 16 bits, torch's kernel takes twice as long for such
    lengths. The gradients of SmolLM2's layers differ from the exact ones by 0.6 %, with torch's
    kernel by 0.5 %.

    Shorter sequences end in zeros: later tokens, which no token of theirs attends to.
    """

    MAX_LENGTH = 512
    """torch's kernel is faster from about 600 tokens on a CPU without AMX, and from over 1,000 with
    it."""

    @classmethod
    def is_faster(cls, query: Tensor, key: Tensor, value: Tensor, longest: int) -> bool:
        # IA3 over 4 bits leaves keys in float32: torch's kernel casts them under autocast.
        is_16bit = {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
        is_16bit_cpu = query.device.type == "cpu" and is_16bit
        is_usual = query.shape[-1] == value.shape[-1] and longest <= cls.MAX_LENGTH
        return is_16bit_cpu and is_usual and torch.is_grad_enabled()

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.lengths = lengths
        ctx.scaling = scaling
        heads = key.shape[1]
        q, k, v = (_by_key_head(x, heads, lengths) for x in (query, key, value))
        output = torch.bmm(ShortAttention.weights(q, k, scaling), v)
        return _by_token(output, query.shape[1], lengths).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads = key.shape[1]
        # Zeros where grad_output is padded: padding adds nothing to any gradient.
        q, k, v, grad_o = (
            _by_key_head(x, heads, ctx.lengths)
            for x in (query, key, value, grad_output.transpose(1, 2))
        )
        p = ShortAttention.weights(q, k, ctx.scaling)
        grad_p = torch.bmm(grad_o, v.mT)
        # The kernel of softmax's own backward pass, which no public function calls.
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.scaling)
        grad_q = _by_token(torch.bmm(grad_scores, k), query.shape[1], ctx.lengths)
        grad_k = _by_token(torch.bmm(grad_scores.mT, q), heads, ctx.lengths)
        grad_v = _by_token(torch.bmm(p.mT, grad_o), heads, ctx.lengths)
        return grad_q, grad_k, grad_v, None, None

    @staticmethod
    def weights(q: Tensor, k: Tensor, scaling: float) -> Tensor:
        """Softmax over the tokens before and at each token: [N, G L, d], [N, L, d] -> [N, G L,
        L]."""
        length = k.shape[1]
        future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
        scores = torch.bmm(q * scaling, k.mT)
        return scores.view(len(k), -1, length, length).add_(future).softmax(-1).view_as(scores)


def _by_key_head(x: Tensor, key_heads: int, lengths: list[int]) -> Tensor:
    """[1, heads, T, d] -> [sequences x key heads, G L, d], padded with zeros: the G query heads
    that share a key head stand one below the other."""
    tokens = x[0].transpose(0, 1)
    if min(lengths) == max(lengths):
        padded = tokens.unflatten(0, (len(lengths), -1))
    else:
        padded = pad_sequence(tokens.split(lengths), batch_first=True)
    return padded.transpose(1, 2).reshape(len(lengths) * key_heads, -1, x.shape[-1])


def _by_token(x: Tensor, heads: int, lengths: list[int]) -> Tensor:
    """[sequences x key heads, G L, d] -> [1, heads, T, d], without the padding."""
    padded = x.view(len(lengths), heads, -1, x.shape[-1]).transpose(1, 2)
    if min(lengths) == max(lengths):
        tokens = padded.flatten(0, 1)
    else:
        tokens = torch.cat([part[:n] for part, n in zip(padded, lengths, strict=True)])
    return tokens.transpose(0, 1)[None]


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
AttentionInterface.register(VARLEN, attend_varlen)
