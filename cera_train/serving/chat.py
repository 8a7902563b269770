"""Asks a model: one question, a file of them, or a conversation in the terminal. Answers are streamed."""

from __future__ import annotations

import sys

import torch
from transformers import TextStreamer

from cera_train.cera import for_inference
from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line
from cera_train.common.trust import clean
from cera_train.data.rows import Row, at
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.evaluation.generate import Likeliest, Request, SeededSampling, only_the_chosen, prepare_generation
from cera_train.model.weights import positions_of
from cera_train.serving.loading import load
from cera_train.serving.prompts import Prompts, choose_rows, read_prompts
from cera_train.settings.serving import ChatConfig

NEW, END = "/new", "/end"


def chat(config: ChatConfig) -> None:
    """Answers the questions of a config: `prompt`, `prompts`, those of stdin, or a person's in a terminal.

    Raises:
        UserError: a run, the file or a question cannot be used.
    """
    quiet_libraries()
    answerers = [Answerer(config, place) for place in (config.run, config.compare) if place is not None]
    if config.prompts is not None:
        answer_file(answerers, config)
    elif config.prompt is not None or not sys.stdin.isatty():
        answer(answerers, [config.prompt if config.prompt is not None else sys.stdin.read().strip()])
    else:
        converse(answerers)


# --- one model -------------------------------------------------------------------------------------------------------


class Answerer:
    """A model that answers, and how it is asked."""

    def __init__(self, config: ChatConfig, place: str) -> None:
        self.config, self.loaded, self.asked = config, load(config, place), 0
        run, tokenizer = self.loaded.subject.run, self.loaded.tokenizer
        self.prompts = Prompts(choose_rows(config.template, run.data if run else None, tokenizer), tokenizer)
        prepare_generation(self.loaded.base, tokenizer, config.max_new_tokens, stop=[])

    @torch.no_grad()
    def answer(self, row: Row) -> str:
        """Streams the answer to a row's prompt to stdout, and returns it."""
        ids = self.prompts.ids(row)
        self._check_fits(len(ids))
        request = Request("chat", self.asked, tuple(ids))  # every question draws other random numbers
        self.asked += 1
        generation, room = self.config.generation, self.config.max_new_tokens
        choose = SeededSampling([request], room, generation) if generation.temperature else Likeliest()
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        with self.loaded.autocast, for_inference(model):
            output = model.generate(
                input_ids=torch.tensor([ids], device=model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
                logits_processor=[only_the_chosen(choose)],
                streamer=CleanStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()

    def _check_fits(self, tokens: int) -> None:
        positions = positions_of(self.loaded.base.config)
        if positions is not None and tokens + self.config.max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens={self.config.max_new_tokens} after a prompt of {tokens} tokens is beyond the "
                f"{positions} positions of this model: lower max_new_tokens, or shorten the prompt."
            )


class CleanStreamer(TextStreamer):
    """Prints words as they come, without what steers a terminal, and without the space before the first."""

    has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = clean(text) if self.has_begun else clean(text).lstrip()
        self.has_begun = self.has_begun or bool(shown)
        print(shown, end="\n" if stream_end else "", flush=True)


# --- questions -------------------------------------------------------------------------------------------------------


def answer(answerers: list[Answerer], turns: list[str]) -> list[str]:
    """One question, answered by each model; named where there are two."""
    if not turns[-1].strip():
        raise UserError("stdin is empty: write a question to it, or set prompt=....")
    return answer_row(answerers, [answerer.prompts.row(turns) for answerer in answerers])


def answer_row(answerers: list[Answerer], rows: list[Row]) -> list[str]:
    answers = []
    for answerer, row in zip(answerers, rows, strict=True):
        if len(answerers) > 1:
            print(f"[{answerer.loaded.name}]", flush=True)
        answers.append(answerer.answer(row))
    return answers


def answer_file(answerers: list[Answerer], config: ChatConfig) -> None:
    """Every question of a file, each after its place."""
    questions = [read_prompts(config.prompts, answerer.prompts) for answerer in answerers]
    found = False
    for placed in zip(*questions, strict=True):
        found, place = True, placed[0][0]
        print(f"--- {place}", flush=True)
        with at(place):
            answer_row(answerers, [row for _, row in placed])
    if not found:
        raise UserError(f"prompts={config.prompts} has no questions: write one on each line.")


def converse(answerers: list[Answerer]) -> None:
    """A conversation in the terminal, until its input ends."""
    for answerer in answerers:
        print_line("model", answerer.loaded.name)
    keeps_turns = all(answerer.prompts.keeps_turns for answerer in answerers) and len(answerers) == 1
    memory = "sees the turns before it" if keeps_turns else "stands alone, as in training"
    print_line("chat", f"each question {memory}; {NEW} begins anew, {END} or Ctrl-D ends")
    turns: list[str] = []
    while (line := read_line()) is not None:
        if line == NEW:
            turns = []
        elif line:
            try:
                answers = answer(answerers, [*turns, line])
            except UserError as error:
                print_line("note", f"{error} {NEW} begins anew." if turns else str(error))
                continue
            turns = [*turns, line, answers[0]] if keeps_turns else []


def read_line() -> str | None:
    """What the person writes; None at the end."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line == END else line
