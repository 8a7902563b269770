"""Protection against texts of strangers: none controls the terminal. Secrets stay out of everything
that a run writes or prints."""

import os
import re
from typing import Any

from cera_train.common.settings import map_values

UNSAFE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, such as the start of a terminal's escape sequence; marks that reorder the
letters after them; and halves of a surrogate pair, which no file or terminal accepts."""


def clean(text: str) -> str:
    """A text of a model, a data file or a stranger's run, with only printable characters."""
    return UNSAFE_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.expandtabs(4))


SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:^|_)(?:API|ACCESS|AUTH|PRIVATE)?(?:TOKEN|KEY)S?(?:_|$)",
    re.IGNORECASE,
)
"""Matches HF_TOKEN and OPENAI_APIKEY, but not TOKENIZER_PATH, KEYSTORE_DIR or MONKEY_HOME, whose
values a config may hold."""

URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
SHORTEST_SECRET = (
    8  # characters; shorter values ("1", "true") are settings, and would redact ordinary words
)


def redact(text: str) -> str:
    """The text with `***` for every secret of the environment and the credentials of every URL in
    it."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return URL_CREDENTIALS.sub("***", text)


def redact_tree(tree: Any) -> Any:
    """`redact` for every string in nested dicts and lists."""
    return map_values(redact, tree, str)


def for_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = clean(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*_\[\]|#$~]", r"\\\g<0>", text)
