"""Text -> token ids, by a tokenizer of transformers; and digests of what decides them. Nothing here
imports torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cera_train.common.files import read_json, write_text


def ids_of(texts: str | list[str], tokenizer: Any) -> list:
    """The token ids of a text or of each of several, without special tokens."""
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


def ids_of_pieces(pieces: list[tuple[str, bool]], tokenizer: Any) -> list[list[int]]:
    """The token ids of texts, each with whether it follows another. Llama 2's tokenizer and others
    add a space before what they take for the start of a text, but not after a line break."""
    if not pieces:
        return []
    texts = [text for text, _ in pieces]
    plain = ids_of(texts, tokenizer)
    [first, *_] = tokenizer.convert_ids_to_tokens(ids_of("a", tokenizer)) or [""]
    if not first.startswith(("\u2581", "\u0120")):  # how tokens spell a space
        return plain
    line_break = ids_of("\n", tokenizer)
    after = ids_of([f"\n{text}" for text in texts], tokenizer)
    count = len(line_break)
    return [
        long[count:] if follows and long[:count] == line_break else ids
        for (_, follows), ids, long in zip(pieces, plain, after, strict=True)
    ]


def start_ids(tokenizer: Any) -> list[int]:
    """The start token if the tokenizer writes one before a text, else nothing."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def stop_ids(tokenizer: Any, model_ends: int | list[int] | None) -> set[int]:
    """The tokens at which generation stops: the tokenizer's end token, and those of a model's
    generation settings."""
    return {
        tokenizer.eos_token_id,
        *(model_ends if isinstance(model_ends, list) else [model_ends]),
    } - {None}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer beside a model or an adapter. A plain model then also stops at the
    tokenizer's end token, as its run does: `generate` knows only the generation settings."""
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    if not file.exists():  # beside an adapter
        return
    # Not by GenerationConfig, which refuses to save published settings that have a temperature and
    # no do_sample.
    settings = read_json(file)
    ends = sorted(stop_ids(tokenizer, settings.get("eos_token_id")))
    settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_text(file, json.dumps(settings, indent=2) + "\n")


def words_of(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """All that says how a tokenizer cuts text, and its special tokens."""
    # The first call removes truncation and padding, which tokenizer.json may hold.
    ids_of("", tokenizer)
    is_fast = tokenizer.is_fast
    words = tokenizer.backend_tokenizer.to_str() if is_fast else [*tokenizer.get_vocab().items()]
    return words, tokenizer.special_tokens_map


def digest_of_parts(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
