"""Attention by sequence against attention over one row under a block mask, and over each sequence
alone."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from oracles import Causal, under_a_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.tiny_models import tiny_model
from cera_train.model.attention import (
    BY_SEQUENCE,
    VARLEN,
    Sequences,
    attend_by_sequence,
    attend_varlen,
)
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe

LENGTHS = [5, 1, 9, 3]
KERNEL = "torch.nn.attention.varlen.varlen_attn"


def heads(length: int = sum(LENGTHS), dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value: 4 heads on 2."""
    return [
        torch.randn(1, count, length, 8, dtype=dtype, requires_grad=True) for count in (4, 2, 2)
    ]


def sequence_after_sequence(
    query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa
):
    """varlen_attn as torch documents it, for the backward window of causal attention."""
    assert enable_gqa
    assert window_size[1] == 0
    assert torch.equal(starts, key_starts)
    assert starts.dtype == torch.int32
    assert longest == longest_key == starts.diff().max()
    outputs = []
    for start, end in itertools.pairwise(starts.tolist()):
        ones = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        mask = ones if window_size[0] < 0 else ones.triu(-window_size[0])
        q, k, v = (heads[start:end].transpose(0, 1) for heads in (query, key, value))
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(
                0, 1
            )
        )
    return torch.cat(outputs)


def sequence_after_sequence_in_torch_2_11(*qkv_and_lengths, scale, window_size):
    """It shares key heads among query heads unasked."""
    return sequence_after_sequence(
        *qkv_and_lengths, scale=scale, window_size=window_size, enable_gqa=True
    )


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize(
    ("attend", "kernel"),
    [
        (attend_by_sequence, None),
        (attend_varlen, sequence_after_sequence),
        (attend_varlen, sequence_after_sequence_in_torch_2_11),
    ],
)
def test_it_equals_one_row_under_a_block_mask(monkeypatch, attend, kernel, window):
    monkeypatch.setattr(KERNEL, kernel)
    inputs = heads()
    got, no_weights = attend(
        Causal(), *inputs, None, sequences=Sequences(LENGTHS), sliding_window=window
    )
    expected = under_a_mask(*inputs, LENGTHS, window)
    torch.testing.assert_close(got, expected)
    assert no_weights is None
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, upstream) for y in (got, expected)))


def test_under_autocast_the_kernel_gets_16_bits(monkeypatch):
    dtypes = set()

    @functools.wraps(sequence_after_sequence)
    def kernel(query, key, value, *args, **kwargs):
        dtypes.update((query.dtype, key.dtype, value.dtype))
        return sequence_after_sequence(query, key, value, *args, **kwargs)

    monkeypatch.setattr(KERNEL, kernel)
    # float32, as norms between projection and attention leave them.
    query, key, value = heads(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        attend_varlen(
            Causal(), query, key.bfloat16(), value.bfloat16(), None, sequences=Sequences(LENGTHS)
        )
    assert dtypes == {torch.bfloat16}


def test_torchs_kernel_accepts_our_call():
    """As far as this can be tested without a GPU: only shapes, on the meta device."""
    query, key, value = (x.detach().to("meta", torch.bfloat16) for x in heads())
    got, _ = attend_varlen(
        Causal(), query, key, value, None, sequences=Sequences(LENGTHS), scaling=0.3, dropout=0.0
    )
    assert got.shape == (1, sum(LENGTHS), 4, 8)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (None, "varlen attention: Could not run "),  # as torch's own on a CPU
        (0.1, "varlen attention: other logits"),
        (0.0, ""),
    ],
)
def test_the_kernel_is_used_only_if_it_agrees_else_its_fallback_is_named(monkeypatch, error, named):
    model = make_tiny_llama()
    monkeypatch.setattr("cera_train.model.layout.kernel_may_run", lambda device, dtype: True)
    if error is not None:

        @functools.wraps(sequence_after_sequence)
        def kernel(*args, **kwargs):
            return sequence_after_sequence(*args, **kwargs) + error

        monkeypatch.setattr(KERNEL, kernel)
    language_model = LanguageModel(model, model)
    choose_layout(language_model)
    assert language_model.attention == (BY_SEQUENCE if named else VARLEN)
    fallback = "".join(language_model.allowed.refused)
    assert named in fallback
    assert bool(fallback) == bool(named)


WINDOWS = {"layer_types": ["full_attention", "chunked_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("layer", "settings", "named"),
    [
        (0, {"softcap": 30.0}, "softcap"),
        (0, {"is_causal": False}, "both ways"),
        (0, {"sliding_window": 4}, "full_attention"),
        (1, {}, "chunked_attention"),
    ],
)
def test_attention_that_is_more_than_causal_or_restricted_only_by_a_mask_is_refused(
    layer, settings, named
):
    module = Causal()
    module.config = SimpleNamespace(**WINDOWS)
    module.layer_idx = layer
    with pytest.raises(NotImplementedError, match=rf"more than causal \({named}\)"):
        attend_by_sequence(module, *heads(), None, sequences=Sequences(LENGTHS), **settings)


def test_keys_in_float32_beside_16_bit_queries_have_gradients_under_autocast():
    query, key, value = heads(dtype=torch.bfloat16)
    gradients = []
    for k in (key, key.detach().float().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = attend_by_sequence(
                Causal(), query, k, value, None, sequences=Sequences(LENGTHS)
            )
        gradients.append(torch.autograd.grad(output.float().square().sum(), k)[0].float())
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.1)


def test_the_users_choice_of_attention_is_kept():
    model = tiny_model("gemma2", attn_implementation="eager")  # it caps its scores softly
    language_model = LanguageModel(model, model)
    probe(language_model)
    assert language_model.allowed.flattens
    assert language_model.allowed.attention is None
    assert model.config._attn_implementation == "eager" != BY_SEQUENCE
