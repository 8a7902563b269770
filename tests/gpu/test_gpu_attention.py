"""Attention over flat rows: the kernel for sequences of many lengths against SDPA, flat rows
against padded ones."""

import pytest
import torch
from conftest import make_tiny_llama
from oracles import Causal, under_a_mask

from cera_train.model.attention import (
    BY_SEQUENCE,
    VARLEN,
    Sequences,
    attend_by_sequence,
    attend_varlen,
)
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import probe

pytestmark = pytest.mark.gpu

LENGTHS = [130, 1, 257, 64]


def qkv(device, width: int) -> list[torch.Tensor]:
    """8 heads on 2, in float64, of values that bf16 holds."""
    shapes = ((heads, sum(LENGTHS), width) for heads in (8, 2, 2))
    return [
        torch.randn(1, *shape, device=device).bfloat16().double().requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [BY_SEQUENCE, VARLEN])
def test_attention_equals_sdpa_under_a_block_mask(device, bf16, way, dtype, width, window):
    """Within twice the error that SDPA itself has in 16 bits, forward and backward."""
    if way == VARLEN and device.type != "cuda":
        pytest.skip("a CPU has no such kernel")
    exact = qkv(device, width)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    attend = attend_varlen if way == VARLEN else attend_by_sequence
    expected = under_a_mask(*exact, LENGTHS, window)
    got, _ = attend(Causal(), *rounded, None, sequences=Sequences(LENGTHS), sliding_window=window)
    plain = under_a_mask(*rounded, LENGTHS, window)
    upstream = torch.randn_like(got)
    true = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    ours = [got, *torch.autograd.grad(got, rounded, upstream)]
    theirs = [plain, *torch.autograd.grad(plain, rounded, upstream)]
    for one, other, value in zip(ours, theirs, true, strict=True):
        assert (one - value).norm() <= 2 * (other - value).norm() + 1e-3 * value.norm()


def test_a_run_here_takes_the_fastest_attention(device, bf16):
    model = make_tiny_llama().to(device, torch.bfloat16)
    language_model = LanguageModel(model, model)
    assert probe(language_model).attention == (VARLEN if device.type == "cuda" else BY_SEQUENCE)
