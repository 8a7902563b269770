"""A user's own files: how their rows are read and which are held out, without any setting."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from examples import CHAT, CONVERSATION

from cera_train.common.errors import UserError
from cera_train.data.chats import chat_of, unmarked_exchanges
from cera_train.data.look import describe_stop
from cera_train.data.prepare import TokenizedRows, prepare_data, prepare_evaluation
from cera_train.data.rendering import Chat
from cera_train.data.rows import Source, rows_of
from cera_train.data.sources import decide_layouts, rows_by_prompt
from cera_train.runs.records import load_config
from cera_train.settings.data import DataConfig, MixPart
from cera_train.training.train import train

pytest_plugins = ["examples"]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def own(compose, write_jsonl):
    """own(rows, *overrides) -> the rows' DataConfig as the command line composes it from
    `data.train_files` alone"""

    def own(rows: list[dict], *overrides: str) -> DataConfig:
        return compose(
            "data=jsonl", f"data.train_files=[{write_jsonl('rows.jsonl', rows)}]", *overrides
        ).data

    return own


def texts_of_chat(chat: Chat) -> list[str]:
    """The texts of a chat without markup, those of the context joined."""
    exchanges = unmarked_exchanges(chat)
    texts = [text for exchange in exchanges for text in (exchange.prompt, exchange.answer)]
    return [text for text in texts if text]


TALK = ["Be brief.hello", "hello there", "next?", "0.84"]
CONTINUED = {"prompt": CHAT["messages"][:4], "completion": CHAT["messages"][4:]}


@pytest.mark.parametrize(
    ("row", "layout", "texts"),
    [
        (CHAT, "messages", TALK),
        (CONTINUED, "messages", TALK),
        (CONVERSATION, "conversations", TALK),
        (
            {"instruction": "Add.", "input": "1", "output": "2"},
            "instruction",
            ["Question: Add.\n1\nAnswer:", " 2"],
        ),
        ({"prompt": "1+", "completion": "1"}, "text", ["1+", "1"]),
        (
            {"question": "1+1?", "answer": "2", "messages": None},
            "text",
            ["Question: 1+1?\nAnswer:", " 2"],
        ),
        ({"text": "Once upon a time."}, "documents", ["Once upon a time."]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_columns_of_the_first_rows_choose_the_layout(own, row, layout, texts):
    config = own([row, row])
    assert config.layout == layout
    assert texts_of_chat(chat_of(row, config, False)) == texts
    assert decide_layouts(config) == config


def test_given_templates_choose_text_and_each_part_of_a_mix_is_read_by_its_own_columns(
    own, write_jsonl
):
    alpaca = {"instruction": "a", "output": "b"}
    assert (
        own([alpaca], "data.prompt='{instruction}:'", "data.completion='{output}'").layout == "text"
    )
    chats = write_jsonl("chats.jsonl", [CHAT])
    rows = write_jsonl("alpaca.jsonl", [alpaca])
    parts = [
        MixPart(train_files=[str(chats)]),
        MixPart(train_files=[str(rows)]),
        MixPart(path="a/b", layout="text"),
    ]
    mixed = decide_layouts(replace(own([alpaca]), layout="auto", train_files=[], mix=parts))
    assert [part.layout for part in mixed.mix] == ["messages", "instruction", "text"]
    assert [part.turns for _, part in mixed.parts()] == ["all"] * 3


TEXTS = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
ASKED = [{"role": "user", "content": "1 + 1?"}]
MESSAGES = {
    "prompt": ASKED,
    "chosen": [{"role": "assistant", "content": "2"}],
    "rejected": [{"role": "assistant", "content": "3"}],
}


JOINED = {side: [*ASKED, *MESSAGES[side]] for side in ("chosen", "rejected")}
"""Each answer after the prompt that both have."""


@pytest.mark.parametrize(
    ("row", "layout"), [(TEXTS, "text"), (MESSAGES, "messages"), (JOINED, "messages")]
)
@pytest.mark.parametrize("source", ["+recipe=dpo", "data=jsonl train.objective=dpo"])
def test_preferences_are_texts_or_messages(compose, write_jsonl, source, row, layout):
    file = f"data.train_files=[{write_jsonl('pairs.jsonl', [row])}]"
    data = compose(*source.split(), file).data
    assert data.layout == layout
    for side, answer in enumerate("23"):
        assert texts_of_chat(chat_of(row, data, False, side)) == ["1 + 1?", answer]


def test_a_preference_may_name_its_column(compose, write_jsonl):
    row = {"worse": TEXTS["rejected"], **TEXTS}
    row.pop("rejected")
    file = f"data.train_files=[{write_jsonl('pairs.jsonl', [row])}]"
    assert compose("+recipe=dpo", file, "data.rejected=worse").data.rejected == "{worse}"


def test_documents_of_a_text_file_are_lines_or_separated_by_blank_lines(tmp_path, tokenizer):
    path = tmp_path / "t.txt"

    def documents(text: str) -> list:
        path.write_bytes(text.encode())
        return [row["text"] for _, row in rows_of([str(path)])]

    assert documents("\none\r\ntwo\n\n") == ["one", "two"]
    assert documents("one\nmore\n \n\n two\n") == ["one\nmore", " two"]
    assert documents("") == []
    documents("\n".join(f"line {number}" for number in range(6)))
    data = prepare_data(
        decide_layouts(DataConfig(layout="auto", train_files=[str(path)])), tokenizer
    )
    assert (len(data.train), len(data.evaluation)) == (5, 1)
    mask = data.train.tokens("loss_mask", 0).to_pylist()
    assert mask == [False, *[True] * (len(mask) - 1)]


def test_a_document_longer_than_max_length_is_cut_into_rows_without_loss(own, tokenizer):
    def documents(rows: TokenizedRows) -> list[str]:
        ids = [rows.tokens("input_ids", row).to_pylist() for row in range(len(rows))]
        assert all(row[0] == tokenizer.bos_token_id and len(row) <= 8 for row in ids)
        return "".join(tokenizer.decode(row[1:]) for row in ids).removesuffix("</s>").split("</s>")

    texts = [f"it is {number} next to the value" for number in range(8)]
    texts.append(texts[0])
    config = own([{"text": text} for text in texts], "data.max_length=8")
    data = prepare_data(config, tokenizer)
    assert sorted(documents(data.train) + documents(data.evaluation)) == sorted(texts)
    assert data.train.describe().endswith(" 0 truncated")
    is_learned, line = describe_stop(
        data.train, config.max_length, {tokenizer.eos_token_id}, tokenizer
    )
    # Not the last token of a window within a document.
    assert (is_learned, line.split()[0]) == (True, "</s>")


def test_rows_of_one_prompt_stay_on_one_side(own, tokenizer):
    rows = [{"prompt": f"{number % 20} is ", "completion": f"{number}"} for number in range(100)]
    rows += [{"prompt": "none", "completion": ""}, {"prompt": "3  IS", "completion": "x"}]
    config = own(rows, "data.max_length=64")
    data = prepare_data(config, tokenizer)
    assert (len(data.train), len(data.evaluation), data.shared_prompts) == (96, 5, 0)
    assert data.train.dropped == (1, 0)
    assert prepare_evaluation(config, tokenizer).digest == data.evaluation.digest


@pytest.mark.parametrize(
    ("counts", "rows"),
    [([1] * 100, 5), ([1] * 3, 1), ([1] * 20_000, 500), ([30, 40, 50], 30)],
)
def test_a_twentieth_of_the_rows_but_at_least_one_prompt_is_held_out(counts, rows):
    row = {"prompt": "", "completion": "x"}
    prompts = [
        row | {"prompt": str(number)} for number, count in enumerate(counts) for _ in range(count)
    ]
    source = Source.numbered("", [*prompts, *[row | {"completion": ""}] * 9], "x")
    config = DataConfig(prompt="{prompt}", completion="{completion}", train_files=["x.jsonl"])
    held_out = rows_by_prompt(config, source)
    assert len(held_out) == rows
    assert not {prompts[number]["prompt"] for number in held_out} & {
        row["prompt"] for number, row in enumerate(prompts) if number not in held_out
    }


def test_look_shows_the_rows_as_the_run_would_read_them_and_trains_nothing(
    tiny_folder, write_jsonl, tmp_path, run_command, capsys
):
    question, answer = CHAT["messages"][1:3]
    turns = [[question | {"content": f"next to {number}?"}, answer] for number in range(40)]
    write_jsonl(
        "rows.jsonl", [{"messages": turn * (1 + number // 30)} for number, turn in enumerate(turns)]
    )
    settings = [f"model.path={tiny_folder}", "data.train_files=[rows.jsonl]", "data.max_length=128"]
    sweep = tmp_path / "outputs" / "default" / "sweep.json"  # a run of this name would be refused
    sweep.parent.mkdir(parents=True)
    sweep.touch()
    assert run_command("cera-train", *settings, "--look") == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line[:11].strip(): line[11:] for line in lines}
    assert values["train"].startswith("38 rows, ")
    assert values["stop"].startswith(
        "<|im_end|> ends answers, but generation stops at </s> only: set eos_token in"
    )
    assert "[[hello there<|im_end|>]]" in "\n".join(lines)
    assert values["train it"] == shlex.join(["cera-train", "data=jsonl", *settings])
    files = {path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts}
    assert files == {tmp_path / "rows.jsonl", sweep}


def test_a_run_records_its_decisions_and_no_longer_needs_the_files_once_finished(
    tiny_config, write_jsonl, capsys
):
    path = write_jsonl(
        "rows.jsonl", [{"question": f"{number}?", "answer": f"{number}"} for number in range(40)]
    )
    settings = ["data=jsonl", f"data.train_files=[{path}]", "train.max_updates=1"]
    config = tiny_config(*settings)
    # From Python, where no command decides the layout.
    undecided = replace(config.data, layout="auto", prompt=None, completion=None)
    result = train(replace(config, data=undecided))
    assert re.search(
        r"^layout +text, prompt='Question: {question}\\nAnswer:', completion=' {answer}'; 5% ",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    recorded = load_config(Path(result["folder"]) / "config.yaml").data
    assert recorded == config.data
    path.unlink()
    assert train(tiny_config(*settings)) == result
    with pytest.raises(UserError, match=r"data\.loss_on was"):
        train(tiny_config(*settings, "data.loss_on=all"))
