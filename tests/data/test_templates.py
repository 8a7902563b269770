"""What is supervised of a chat is what the model would have to write, after what inference would
show it: for the original chat templates in TRL's wheel and seven kinds of chat, by renderings of
transformers alone."""

import json
from datetime import date
from importlib.metadata import version

import jinja2
import pytest
from examples import data_config

from benchmarks.chat_templates import CHATS, PAGE, TRL, originals, page, tokenizer_with
from cera_train.common.errors import UserError
from cera_train.data.chats import prompt_of, up_to_supervised
from cera_train.data.reader import Reader
from cera_train.data.sources import decide_switches
from cera_train.data.templates import DATE, WITHOUT

TEMPLATES = originals(TRL)

PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates of models that see images, which take a content as a list of parts."""


def sequences_of(row: dict, tokenizer, **settings) -> list:
    """The sequences of a row, each a list of (the text before an answer, the answer, how its prompt
    was opened)."""
    if DATE in tokenizer.chat_template:  # transformers alone writes today's
        settings["template_settings"] = {DATE: date.today().isoformat()}
    config = data_config(layout="messages", **settings)
    sequences = []
    for exchanges in Reader(config, tokenizer).sequences(row):
        asked = up_to_supervised(exchanges)
        sequences.append([(prompt_of(each), each[-1].answer, each[-1].opening) for each in asked])
    return sequences


# --- the oracle: transformers alone ---------------------------------------------------------------


def forms_of(name: str, messages: list[dict]) -> list[list[dict]]:
    """The messages as the template may take them."""
    if name in PARTS:
        return [
            [
                message | {"content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        ]
    as_json = json.loads(json.dumps(messages))
    for message in as_json:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return [messages, as_json]


def aliased(messages: list[dict]) -> list[dict]:
    """As transformers from 5.24 on passes reasoning to templates such as gpt-oss's."""
    return [
        {"thinking": message["reasoning_content"], **message}
        if "reasoning_content" in message
        else message
        for message in messages
    ]


def rendering(tokenizer, messages: list[dict], tools, prompt: bool = False, **switch) -> str:
    return tokenizer.apply_chat_template(
        aliased(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **switch
    )


def is_inexpressible(name: str, tokenizer, row: dict) -> bool:
    """Whether the template refuses the chat in every form, or renders it no otherwise where a part
    is taken out: the tools, or the reasoning or the calls of an answer."""
    return not any(
        is_rendered_whole(tokenizer, messages, row.get("tools"))
        for messages in forms_of(name, row["messages"])
    )


def is_rendered_whole(tokenizer, messages: list[dict], tools) -> bool:
    try:
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            whole = rendering(tokenizer, messages[: number + 1], tools)
            if tools and whole == rendering(tokenizer, messages[: number + 1], None):
                return False
            for part in {"reasoning_content", "tool_calls"} & message.keys():
                less = {key: value for key, value in message.items() if key != part}
                if whole == rendering(tokenizer, [*messages[:number], less], tools):
                    return False
    except (jinja2.TemplateError, TypeError):
        return False
    return True


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_the_difference_of_two_renderings_or_cannot_be_expressed(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    for kind, row in CHATS.items():
        if is_inexpressible(name, tokenizer, row):
            with pytest.raises(UserError, match="left out|refuses these messages"):
                sequences_of(row, tokenizer)
            continue
        sequences = sequences_of(row, tokenizer)
        messages = row["messages"]
        answers = [answer for sequence in sequences for answer in sequence]
        asked = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        assert len(answers) == len(asked), kind
        for number, answer in zip(asked, answers, strict=True):
            assert any(
                is_difference(tokenizer, form, number, row.get("tools"), answer)
                for form in forms_of(name, messages)
            ), kind


@pytest.mark.skipif(f"TRL {version('trl')}," not in PAGE.read_text(), reason="of another TRL")
def test_the_page_is_what_make_templates_writes():
    assert page(TEMPLATES) == PAGE.read_text()


@pytest.mark.parametrize("name", TEMPLATES)
def test_whatever_asks_a_run_asks_as_its_rows_were_answered(name, write_jsonl):
    tokenizer = tokenizer_with(TEMPLATES[name])
    for kind in ("one turn", "two turns", "system", "reasoning"):
        row = CHATS[kind]
        if is_inexpressible(name, tokenizer, row):
            continue
        config = data_config(train_files=[str(write_jsonl("chat.jsonl", [row]))], layout="messages")
        config = decide_switches(config, tokenizer)
        reader = Reader(config, tokenizer)
        learned = [asked for each in reader.sequences(row) for asked in up_to_supervised(each)]
        questions = reader.questions("a row", row)
        assert list(map(prompt_of, learned)) == [question.prompt for question in questions], kind
        unanswered = row | {"messages": row["messages"][:-1]}
        assert reader.prompt(unanswered) == questions[-1].prompt_ids, kind
        golds = [each["content"] for each in row["messages"] if each["role"] == "assistant"]
        assert [question.gold for question in questions] == golds, kind


def is_difference(tokenizer, messages: list[dict], number: int, tools, answer: tuple) -> bool:
    before, text, opening = answer
    switch = {name: value for name, value in opening.items() if name != WITHOUT}
    try:
        prompt = rendering(tokenizer, messages[:number], tools, prompt=True, **switch)
        full = rendering(tokenizer, messages[: number + 1], tools, **switch)
    except (jinja2.TemplateError, TypeError):
        return False
    end = full.removesuffix(tokenizer.eos_token).rstrip()
    is_end = full.rstrip().endswith(text) or end.endswith(text)
    if full.startswith(prompt):
        return before == prompt and is_end and full[len(prompt) :].startswith(text)
    # The prompt opens reasoning that the answer lacks, or earlier turns are written anew.
    is_opened = prompt.startswith(before) and full.startswith(before)
    return is_end and (is_opened or before == prompt)


def test_a_row_that_does_not_fit_a_switch_of_the_run_has_its_own():
    tokenizer = tokenizer_with(TEMPLATES["nemotron_3_nano"])
    settings = {"enable_thinking": False}  # as rows without reasoning need it
    fitting = sequences_of(CHATS["one turn"], tokenizer, template_settings=settings)
    other = sequences_of(CHATS["reasoning"], tokenizer, template_settings=settings)
    openings = [opening for [[(_, _, opening)]] in (fitting, other)]
    assert openings == [{}, {"enable_thinking": True}]
