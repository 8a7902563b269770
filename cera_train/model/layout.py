"""Padded or flat: how sequences lie in a micro-batch, and which attention they use. A probe of the
model finds out which of these give each sequence the logits that it has alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cera_train.common.errors import error_text
from cera_train.common.settings import require
from cera_train.model.attention import BY_SEQUENCE, VARLEN, kernel_may_run
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.model.language_model import Allowed, LanguageModel

REFUSALS = (NotImplementedError, ImportError, RuntimeError, TypeError, AttributeError)
"""Errors of an attention of ours where the model needs what it does not take, or where the kernel
refuses this GPU, head width or torch."""

SAME_IN_32_BITS = 1e-3
"""Relative difference up to which logits count as equal."""
SAME_IN_16_BITS = 0.05
"""Attention rounds differently under another mask; a leak between sequences is far larger."""


LENGTH = 8  # tokens of each sequence of a probe
HALF = LENGTH // 2


def choose_layout(language_model: LanguageModel, may_flatten: bool = True) -> None:
    """Probes the model, and makes it take flat batches where that is correct and fast: sequences
    end to end in one row, without padding. Sharded weights have to be whole: see
    `LanguageModel.with_whole_weights`."""
    allowed = probe(language_model)
    # On a CPU, attention over one long row under a mask costs more than the padding of rows of
    # near-equal length.
    is_fast = allowed.attention is not None or language_model.device.type != "cpu"
    if allowed.flattens and is_fast and may_flatten:
        language_model.use_flat_batches()


@torch.no_grad()
def probe(language_model: LanguageModel) -> Allowed:
    """Finds out by trying what this architecture allows, and keeps it. Raises UserError where
    tokens see later ones."""
    causal_lm = language_model.causal_lm
    was_training = language_model.training
    language_model.eval()  # dropout would make any two passes differ
    # Autocast for 16-bit weights, since an adapter may need it; else none, to compare more digits.
    is_wide = causal_lm.dtype.itemsize >= 4
    no_autocast = torch.autocast(causal_lm.device.type, enabled=False)
    with no_autocast if is_wide else language_model.autocast():
        expected, noise = pass_twice(language_model, padded_batch)
        require(
            noise <= _tolerance(causal_lm),
            f"model.path={causal_lm.name_or_path}: its tokens see later ones, so it does not "
            "predict the next token. Set is_decoder=true in the config.json of an encoder, or "
            "choose a causal language model.",
        )
        chunks_head = _can_chunk_head(language_model, expected)
        flattens, attention, refused = _find_attention(language_model, expected, noise)
    language_model.train(was_training)
    language_model.allowed = Allowed(chunks_head, flattens, attention, refused)
    return language_model.allowed


def pass_twice(
    language_model: LanguageModel, make: Callable[..., Batch], tokens: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Logits [2, T, V] of two sequences, and the distance by which another second half of the first
    moves those of the tokens before it and of the other sequence: that of rounding in products of
    experts, unless tokens see later ones or other sequences.

    Args:
        make: a batch of sequences.
        tokens: with which the first sequence starts.
    """
    batch, other = _batches(language_model.causal_lm, make, tokens)
    logits, changed = (
        language_model.causal_lm(**language_model.inputs(each)).logits.view(2, LENGTH, -1)
        for each in (batch, other)
    )
    before, after = (torch.cat([each[0, :HALF], each[1]]) for each in (logits, changed))
    return logits, _distance(after, before)


def pass_padded(language_model: LanguageModel, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`pass_twice` of padded rows under autocast, in a context of its own: autocast keeps casts of
    weights until it ends."""
    with language_model.autocast():
        return pass_twice(language_model, padded_batch, tokens)


def _batches(
    causal_lm: PreTrainedModel, make: Callable[..., Batch], tokens: Sequence[int] = ()
) -> tuple[Batch, Batch]:
    """Two sequences, and the same with another second half of the first."""
    vocabulary = causal_lm.config.get_text_config().vocab_size
    first, second, third = (
        [(7 * position + offset) % vocabulary for position in range(1, LENGTH + 1)]
        for offset in (0, 3, 5)
    )
    start = tokens[:HALF]
    first[: len(start)] = start
    masks = [[False] + [True] * (LENGTH - 1)] * 2
    other = first[:HALF] + third[HALF:]
    device = causal_lm.device
    return make([first, second], masks).to(device), make([other, second], masks).to(device)


def _can_chunk_head(language_model: LanguageModel, expected: Tensor) -> bool:
    """Whether the head applied to the decoder's states gives the model's logits."""
    batch, _ = _batches(language_model.causal_lm, padded_batch)
    output = language_model.decoder(**language_model.inputs(batch))
    states = getattr(output, "last_hidden_state", None)  # Llama 4's decoder gives logits
    if states is None:
        return False
    return bool(_distance(language_model.logits(states), expected) <= SAME_IN_32_BITS)


def _find_attention(
    language_model: LanguageModel, expected: Tensor, noise: Tensor
) -> tuple[bool, str | None, tuple[str, ...]]:
    """Whether sequences that share a row get the logits that they have alone, by which attention
    of ours, and why not by a faster one. One sequence must not move the other beyond the `noise` of
    padded rows: a state that crosses over may do so less than another mask does in 16 bits."""
    causal_lm = language_model.causal_lm
    tolerance = _tolerance(causal_lm)

    def agrees() -> bool:
        logits, leak = pass_twice(language_model, flat_batch)
        is_same = _distance(logits, expected) <= tolerance
        return bool(is_same and leak <= noise + tolerance / 10)

    before = language_model.attention
    if before != "sdpa":  # chosen by the user
        return agrees(), None, ()
    names = [BY_SEQUENCE]
    if kernel_may_run(language_model.device, causal_lm.dtype):
        names.insert(0, VARLEN)
    refused = []
    try:  # the model's sdpa would make a T x T mask for a flat row
        for name in names:
            causal_lm.set_attn_implementation(name)
            # Some models accept no other implementation.
            if language_model.attention != name:
                refused.append(f"{name} attention: this model takes no other than its own")
                break
            try:
                if agrees():
                    return True, name, tuple(refused)
                reason = "other logits"
            except REFUSALS as error:
                reason = error_text(error)[:200]
            refused.append(f"{name} attention: {reason}")
    finally:
        causal_lm.set_attn_implementation(before)
    return agrees(), None, tuple(refused)


def _tolerance(causal_lm: PreTrainedModel) -> float:
    return SAME_IN_32_BITS if causal_lm.dtype == torch.float32 else SAME_IN_16_BITS


def _distance(values: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference, relative to that of the expected values: a scalar."""
    norm = expected.float().norm().clamp(min=1e-30)
    return (values.float() - expected.float()).norm() / norm
