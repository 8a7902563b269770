"""Padded or flat: how sequences lie in a micro-batch, and which attention they use. A probe of the
model finds out which of these give each sequence the logits that it has alone."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cera_train.common.errors import UserError, error_text
from cera_train.model.attention import BY_SEQUENCE, VARLEN, attention_of, kernel_may_run
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.model.language_model import Allowed, LanguageModel

REFUSALS = (NotImplementedError, ImportError, RuntimeError, TypeError, AttributeError)
"""Errors of an attention of ours where the model needs what it does not take, or where the kernel
refuses this GPU, head width or torch."""

SAME_IN_32_BITS = 1e-3
"""Relative difference up to which logits count as equal."""
SAME_IN_16_BITS = 0.05
"""Attention rounds differently under another mask; a leak between sequences is far larger."""


def choose_layout(
    language_model: LanguageModel,
    device: torch.device,
    known: Allowed | None = None,
) -> None:
    """Probes the model, unless it is `known` what it allows, and makes it take flat batches where
    that is correct and fast: sequences end to end in one row, without padding."""
    allowed = known or language_model.with_whole_weights(probe)
    language_model.allowed = allowed
    language_model.fallbacks = [*allowed.refused]
    # On a CPU, attention over one long row under a mask costs more than the padding of rows of
    # near-equal length.
    is_fast = allowed.attention is not None or device.type != "cpu"
    if allowed.flattens and is_fast:
        language_model.use_flat_batches()


@torch.no_grad()
def probe(language_model: LanguageModel) -> Allowed:
    """Finds out by trying what this architecture allows, and keeps it.

    Sharded weights have to be whole: see `LanguageModel.with_whole_weights`.

    Raises:
        UserError: tokens see later ones.
    """
    causal_lm = language_model.causal_lm
    vocabulary = causal_lm.config.get_text_config().vocab_size
    first, second, third = (
        [(7 * position + offset) % vocabulary for position in range(1, 9)] for offset in (0, 3, 5)
    )
    masks = [[False] + [True] * 7] * 2
    was_training = language_model.training
    language_model.eval()  # dropout would make any two passes differ
    # Autocast for 16-bit weights, since an adapter may need it; else none, to compare more digits.
    is_wide = causal_lm.dtype.itemsize >= 4
    no_autocast = torch.autocast(causal_lm.device.type, enabled=False)
    with no_autocast if is_wide else language_model.autocast():
        apart = padded_batch([first, second], masks).to(causal_lm.device)
        expected = causal_lm(**language_model.inputs(apart)).logits
        changed = padded_batch([first[:4] + third[4:], second], masks).to(causal_lm.device)
        _check_causal(language_model, expected, changed)
        chunks_head = _can_chunk_head(language_model, apart, expected)
        beside_other = padded_batch([third, second], masks).to(causal_lm.device)
        moved = causal_lm(**language_model.inputs(beside_other)).logits
        noise = _distance(moved[1], expected[1])  # of products of experts
        flat = flat_batch([first, second], masks).to(causal_lm.device)
        other = flat_batch([third, second], masks).to(causal_lm.device)
        flattens, attention, refused = _find_attention(language_model, flat, other, expected, noise)
    language_model.train(was_training)
    language_model.allowed = Allowed(chunks_head, flattens, attention, refused)
    return language_model.allowed


def _check_causal(language_model: LanguageModel, expected: Tensor, changed: Batch) -> None:
    """Raises UserError if the first half of the first sequence gets other logits in a batch with
    another second half: an encoder such as BERT would see the tokens that it is to predict."""
    causal_lm = language_model.causal_lm
    half = expected.shape[1] // 2
    logits = causal_lm(**language_model.inputs(changed)).logits
    if not _is_close(logits[0, :half], expected[0, :half], _tolerance(causal_lm)):
        raise UserError(
            f"model.path={causal_lm.name_or_path}: its tokens see later ones, so it does not "
            "predict the next token. Set is_decoder=true in the config.json of an encoder, or "
            "choose a causal language model."
        )


def _can_chunk_head(language_model: LanguageModel, batch: Batch, expected: Tensor) -> bool:
    """Whether the head applied to the decoder's states gives the model's logits."""
    output = language_model.decoder(**language_model.inputs(batch))
    states = getattr(output, "last_hidden_state", None)  # Llama 4's decoder gives logits
    if states is None:
        return False
    return _is_close(language_model.logits(states), expected, SAME_IN_32_BITS)


def _find_attention(
    language_model: LanguageModel, flat: Batch, other: Batch, expected: Tensor, noise: Tensor
) -> tuple[bool, str | None, tuple[str, ...]]:
    """Whether sequences that share a row get the logits that they have alone, by which attention
    of ours, and why not by a faster one. `other` has another first sequence: the second's logits
    must not change, beyond the `noise` of padded rows, since a state that crosses over may move
    them less than another mask does in 16 bits."""
    causal_lm = language_model.causal_lm
    tolerance = _tolerance(causal_lm)

    def agrees() -> bool:
        logits = causal_lm(**language_model.inputs(flat)).logits.view_as(expected)
        moved = causal_lm(**language_model.inputs(other)).logits.view_as(expected)
        is_kept = _is_close(moved[1], logits[1], noise + tolerance / 10)
        return _is_close(logits, expected, tolerance) and is_kept

    before = attention_of(causal_lm.config)
    if before != "sdpa":  # chosen by the user
        return agrees(), None, ()
    names = [BY_SEQUENCE]
    device = language_model.device or flat.input_ids.device
    if kernel_may_run(device, causal_lm.dtype):
        names.insert(0, VARLEN)
    refused = []
    try:  # the model's sdpa would make a T x T mask for a flat row
        for name in names:
            causal_lm.set_attn_implementation(name)
            # Some models accept no other implementation.
            if attention_of(causal_lm.config) != name:
                refused.append(f"{name} attention: this model takes no other than its own")
                break
            try:
                if agrees():
                    return True, name, tuple(refused)
                reason = "other logits"
            except REFUSALS as error:
                reason = " ".join(error_text(error).split())[:200]
            refused.append(f"{name} attention: {reason}")
    finally:
        causal_lm.set_attn_implementation(before)
    return agrees(), None, tuple(refused)


def _tolerance(causal_lm: PreTrainedModel) -> float:
    return SAME_IN_32_BITS if causal_lm.dtype == torch.float32 else SAME_IN_16_BITS


def _is_close(values: Tensor, expected: Tensor, tolerance: float | Tensor) -> bool:
    return bool(_distance(values, expected) <= tolerance)


def _distance(values: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference, relative to that of the expected values: a scalar."""
    norm = expected.float().norm().clamp(min=1e-30)
    return (values.float() - expected.float()).norm() / norm
