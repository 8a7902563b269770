"""`cera-chat`: what a question becomes, what answers it, and a conversation in a real terminal."""

import io
import sys
from types import SimpleNamespace

import pytest
from evaluated_runs import chat, evaluate, read

from cera_train.common.errors import UserError
from cera_train.data.asked import choose_rows, row_of_turns
from cera_train.data.reader import Reader
from cera_train.serving.chat import converse
from cera_train.settings.data import DataConfig, MixPart

pytest_plugins = ["evaluated_runs"]

TEXT = {
    "layout": "text",
    "path": "x",
    "prompt": "Question: {question}\nAnswer:",
    "completion": " {answer}",
}
COMPUTED = {"layout": "logistic_map", "eval_rows": 5}
ALL_TURNS = {"layout": "conversations", "path": "x", "turns": "all"}
ONE = "How many?"
TWO = "And now?"
TURNS = [
    {"from": "human", "value": ONE},
    {"from": "gpt", "value": "Six."},
    {"from": "human", "value": TWO},
]


@pytest.mark.parametrize(
    ("data", "turns", "trained_row"),
    [
        (TEXT, [ONE], {"question": ONE, "answer": "Six."}),
        (COMPUTED, ["How?"], {"prompt": "Question: How?\nAnswer:", "completion": "Six."}),
        (ALL_TURNS, [ONE, "Six.", TWO], {"conversations": [*TURNS, TURNS[1]]}),
    ],
    ids=["text", "logistic_map", "all turns"],
)
def test_a_prompt_is_the_trained_row_up_to_its_last_answer(data, turns, trained_row, tokenizer):
    config = DataConfig(**data)
    reader = Reader(config, tokenizer)
    (example,) = reader.examples([("a row", trained_row)])
    ids = reader.prompt(row_of_turns(turns, config))
    assert [*ids] == example.input_ids[: len(ids)]
    assert not example.loss_mask[len(ids) - 1]
    assert all(example.loss_mask[len(ids) : -1])


def test_an_answer_is_the_one_that_an_evaluation_gives(run, eval_config, capsys):
    evaluate(eval_config("task.limit=2"))
    folder = run / "eval" / "gsm8k"
    questions = {line["id"]: line["question"] for line in read(folder / "problems.jsonl")}
    answers = {line["problem"]: line["text"] for line in read(folder / "generations.jsonl")}
    for problem, question in questions.items():
        capsys.readouterr()
        chat(run, f"prompt={question}", "max_new_tokens=8")
        assert capsys.readouterr().out.strip() == answers[problem].strip()


def test_stdin_is_a_question_and_a_seed_an_answer(run, capsys, monkeypatch):
    def answer(*settings: str) -> str:
        chat(run, "max_new_tokens=8", *settings)
        return capsys.readouterr().out

    first, again, other = (
        answer("prompt=How many?", "generation=sample", f"generation.seed={seed}")
        for seed in (1, 1, 2)
    )
    assert first == again != other
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\n"))
    assert answer() == answer("prompt=How many?") != ""


def test_a_question_is_written_as_the_run_reads_or_as_the_template_asks(tokenizer):
    assert choose_rows(None, tokenizer, {}).layout == "messages"
    assert choose_rows(None, SimpleNamespace(chat_template=None), {}).layout == "text"
    assert choose_rows(DataConfig(**TEXT), tokenizer, {}).prompt == TEXT["prompt"]
    parts = [MixPart(path="a/b", prompt="Q: {question}", eval_rows=0), MixPart(path="c/d")]
    mixed = DataConfig(**TEXT | {"path": None, "mix": parts})
    rows = choose_rows(mixed, tokenizer, {})
    assert (rows.prompt, rows.completion) == ("Q: {question}", TEXT["completion"])
    trained = DataConfig(**TEXT, template_settings={"a": 1, "b": 1})
    assert choose_rows(trained, tokenizer, {"b": 2}).template_settings == {"a": 1, "b": 2}


def test_what_cannot_be_asked_is_refused_in_one_line(tokenizer):
    two = DataConfig(**TEXT | {"prompt": "{context} {question}"})
    with pytest.raises(UserError, match="2 columns, and a text fills one"):
        row_of_turns([ONE], two)
    with pytest.raises(UserError, match="^column 'messages' asks nothing: write a question"):
        Reader(DataConfig(layout="messages", path="x"), tokenizer).prompt({"messages": []})


@pytest.fixture
def type_lines(monkeypatch, capsys):
    """type_lines("a", ...) -> a list that gets what is printed before each line, and before the end
    of the input."""

    def type_lines(*lines: str) -> list[str]:
        left = iter(lines)
        printed = []

        def type_line(prompt: str) -> str:
            printed.append(capsys.readouterr().out)
            if (line := next(left, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_line)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        return printed

    return type_lines


def test_a_conversation_continues_after_ctrl_c_and_can_start_over_when_it_is_too_long(type_lines):
    """A first question that is too long by itself cannot."""
    lengths = []

    def answer(turns: list[str]) -> str:
        lengths.append(len(turns))
        if turns[-1] == "cut":
            raise KeyboardInterrupt
        if turns[-1] == "long" or len(turns) > 1:
            raise UserError("It is too long.")
        return "an answer"

    printed = type_lines("cut", "long", "a", "b")
    converse(SimpleNamespace(name="it", keeps_turns=True, row=list, answer=answer))
    notes = [
        line.split(maxsplit=1)[1]
        for line in "".join(printed).splitlines()
        if line.startswith("note")
    ]
    assert notes == [
        "the answer is cut off, and the question dropped.",
        "It is too long.",
        "It is too long. /new starts over.",
    ]
    assert lengths == [1, 1, 1, 3]


def test_a_conversation_keeps_the_turns_and_starts_over(tiny_folder, type_lines):
    printed = type_lines("How many?", "How many?", "/new", "How many?")
    model = ["model=smollm2_135m", f"model.path={tiny_folder}", "model.dtype=float32"]
    chat("base", *model, "max_new_tokens=4")
    head, fresh, again, _, anew = printed
    assert "each question sees the turns before it" in head
    assert fresh == anew != again
