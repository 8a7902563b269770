"""Asks a model one question, or those of a conversation in the terminal. A question becomes the
token ids that the model was trained to answer: a training row without its last answer. Answers are
streamed."""

import signal
import sys
from collections.abc import Sequence

from transformers import TextStreamer

from cera_train.common.errors import UserError
from cera_train.common.settings import require
from cera_train.common.terminal import print_line
from cera_train.common.trust import clean
from cera_train.data.asked import choose_rows, row_of_turns
from cera_train.data.messages import TURNS
from cera_train.data.reader import Reader
from cera_train.data.rows import Row
from cera_train.distributed.accelerator import quiet_libraries, this_device
from cera_train.evaluation.engine import choose_dtype, load_subject, open_server
from cera_train.evaluation.requests import Request, check_positions
from cera_train.runs.subject import Subject, find_subject
from cera_train.settings.serving import ChatConfig

NEW = "/new"


def ask(config: ChatConfig) -> None:
    """Answers a config's question, that of stdin, or a person's in a terminal. Raises UserError for
    a model or a question that cannot be used."""
    quiet_libraries()
    answerer = Answerer(config, find_subject(config))
    if config.prompt is not None or not sys.stdin.isatty():
        question = config.prompt or sys.stdin.read().strip()
        require(bool(question), "stdin is empty: write a question to it, or set prompt=....")
        answerer.answer(answerer.row([question]))
    else:
        converse(answerer)


# --- a model that answers -------------------------------------------------------------------------


class Answerer:
    """A model that answers, and how questions are written for it."""

    def __init__(self, config: ChatConfig, subject: Subject) -> None:
        self.config = config
        self.asked = 0
        self.name = str(subject)
        if config.server is None:
            self.engine = load_subject(choose_dtype(subject), this_device())
        else:
            self.engine = open_server(config.server, subject)
        tokenizer = self.engine.tokenizer
        rows = choose_rows(subject.data, tokenizer, config.template_settings)
        self.reader = Reader(rows, tokenizer)

    @property
    def keeps_turns(self) -> bool:
        """Whether a question is read together with the turns before it."""
        return self.reader.config.layout in TURNS

    def row(self, turns: Sequence[str]) -> Row:
        """The row of a conversation, as `row_of_turns`."""
        return row_of_turns(turns, self.reader.config)

    def answer(self, row: Row) -> str:
        """Streams the answer to a row's prompt to stdout, and returns it."""
        ids = self.reader.prompt(row)
        room = self.config.max_new_tokens
        check_positions("max_new_tokens", room, len(ids), self.engine.positions)
        # A number of its own, so that every question draws other random numbers.
        request = Request("chat", self.asked, ids)
        self.asked += 1
        streamer = CleanStreamer(self.engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
        [[answer]] = self.engine.answers([[request]], room, [], self.config.generation, streamer)
        return answer.generation.text.strip()


class CleanStreamer(TextStreamer):
    """Prints words as they come, without the space before the first, and without the control
    characters of a terminal."""

    has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.has_begun:
            text = text.lstrip()
            self.has_begun = bool(text)
        super().on_finalized_text(clean(text), stream_end)


# --- questions ------------------------------------------------------------------------------------


def converse(answerer: Answerer) -> None:
    """A conversation in the terminal, until its input ends."""
    print_line("model", answerer.name)
    memory = "stands alone, as in training"
    if answerer.keeps_turns:
        memory = "sees the turns before it"
    print_line(
        "chat", f"each question {memory}; {NEW} starts over, Ctrl-C ends an answer, Ctrl-D the chat"
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer
    turns: list[str] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == NEW:
            turns = []
        elif line:
            try:
                answer = answerer.answer(answerer.row([*turns, line]))
            except UserError as error:
                print_line("note", f"{error} {NEW} starts over." if turns else str(error))
                continue
            except KeyboardInterrupt:
                print()
                print_line("note", "the answer is cut off, and the question dropped.")
                continue
            if answerer.keeps_turns:
                turns = [*turns, line, answer]
