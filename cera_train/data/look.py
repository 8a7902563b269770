"""What a run prints about its rows, so that a user can see what the model will learn. Nothing here
imports torch."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cera_train.common.terminal import print_line
from cera_train.data.chats import uses_template
from cera_train.data.messages import TURNS
from cera_train.data.prepare import TokenizedData, TokenizedRows
from cera_train.data.reader import Question
from cera_train.data.sources import HELD_OUT, MOST_HELD_OUT
from cera_train.settings.data import DataConfig

LOOKED_AT = 1000  # rows whose tokens are inspected one by one


def print_data(
    config: DataConfig,
    data: TokenizedData,
    tokenizer: Any,
    stops: set[int],
    questions: Sequence[Question] = (),
    at_length: bool = False,
) -> None:
    """Layout, rows kept, dropped and truncated, the supervised share, shared prompts, an example;
    `at_length` also how long the rows are, and one more example.

    Args:
        stops: the tokens at which generation stops.
        questions: what the model learns to answer, where it does not learn the rows' answers.
    """
    train = data.train
    for line in dict.fromkeys(describe_layouts(config, tokenizer)):
        print_line("layout", line)
    for label, split in (("train", train), ("eval", data.evaluation)):
        print_line(label, split.describe("answers" if config.is_paired else "rows"))
    for line in data.mix:
        print_line("part", line)
    print_line("shared", f"{data.shared_prompts:,} held-out prompts are also training prompts")
    if at_length:
        print_lengths(train)
    if questions:
        print_line("asks", f"{len(questions):,} questions an epoch")
        for question in questions[: 1 + at_length]:
            print_example([(question.prompt, False), (question.gold, True)])
        return
    is_learned, line = describe_stop(train, config.max_length, stops, tokenizer)
    if at_length or not is_learned:
        print_line("stop", line)
    shown = {0}
    if at_length:
        shown.add(len(train) // config.sequences // 2 * config.sequences)
    for row in sorted(shown):
        for sequence in range(row, row + config.sequences):
            print_example(stretches_of(train, sequence, tokenizer))


def describe_layouts(config: DataConfig, tokenizer: Any) -> Iterator[str]:
    """How rows become text, and how some were held out: one line for each part of a mix that is
    read from files."""
    for _, part in config.parts():
        if part.is_computed:
            continue
        names = ("prompt", "completion", "rejected")
        if part.layout in TURNS:
            names = ("rejected",) if part.is_paired else ("turns",)
        settings = {name: getattr(part, name) for name in names}
        words = [str(part.layout)]
        words += [f"{name}={str(value)!r}" for name, value in settings.items() if value is not None]
        if uses_template(part, tokenizer):
            words.append("by the chat template")
            words += [f"{name}={value!r}" for name, value in part.template_settings.items()]
        line = ", ".join(words)
        if part.holds_out_by_prompt:
            line += f"; {HELD_OUT:.0%} of the rows, at most {MOST_HELD_OUT}, are held out by prompt"
        yield line


def print_lengths(rows: TokenizedRows) -> None:
    lengths = sorted(rows.lengths)
    low, median, high = (lengths[int(share * (len(lengths) - 1))] for share in (0.05, 0.5, 0.95))
    print_line(
        "tokens", f"{low:,} (5%), {median:,} (median), {high:,} (95%), {lengths[-1]:,} (longest)"
    )


def describe_stop(
    rows: TokenizedRows, max_length: int, stops: set[int], tokenizer: Any
) -> tuple[bool, str]:
    """Whether the model learns to end its answers where generation stops, and a line about it."""

    def names(tokens: set[int]) -> str:
        return " and ".join(tokenizer.decode(token) for token in sorted(tokens))

    whole = [row for row in range(min(len(rows), LOOKED_AT)) if not rows.truncated[row]]
    # A window of a document that continues after it fills its row.
    last = [tokens_of(rows, row) for row in whole if rows.lengths[row] < max_length]
    ends = {input_ids[-1] for input_ids, loss_mask in last if loss_mask[-1]}
    if not ends:
        return (
            False,
            "all rows are truncated, so the model learns no end of an answer: raise "
            "data.max_length",
        )
    if ends <= stops:
        return True, f"{names(ends)} is supervised at the end of answers: generation stops there"
    fix = f"set eos_token in the model's tokenizer_config.json to {names(ends - stops)}"
    return False, f"{names(ends)} ends answers, but generation stops at {names(stops)} only: {fix}"


def tokens_of(rows: TokenizedRows, row: int) -> tuple[list[int], list[bool]]:
    """The token ids of a row, and which of them are supervised."""
    return rows.tokens("input_ids", row).to_pylist(), rows.tokens("loss_mask", row).to_pylist()


def stretches_of(rows: TokenizedRows, row: int, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """A sequence as texts, and whether each is supervised."""
    tokens = zip(*tokens_of(rows, row), strict=True)
    for is_supervised, run in itertools.groupby(tokens, key=lambda token: token[1]):
        yield tokenizer.decode([id for id, _ in run]), is_supervised


def print_example(stretches: Iterable[tuple[str, bool]]) -> None:
    """Prints texts, with those that are answers between [[ ]]."""
    texts = [f"[[{text}]]" if is_marked else text for text, is_marked in stretches]
    label = "example"
    for line in "".join(texts).split("\n"):
        print_line(label, line)
        label = ""
