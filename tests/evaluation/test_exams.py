"""Accuracy and samples while a run trains: cera-eval's figures, and a training that does not
notice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from evaluated_runs import QUESTIONS, evaluate, read
from played_vllm import playing_vllm
from several_processes import train_in_processes
from tiny_runs import folder_of, train_and_die_after

from cera_train.common.errors import UserError
from cera_train.evaluation.exams import SAMPLE_ROOM, Exams, rows_exam
from cera_train.runs.evaluation_folder import Generation
from cera_train.runs.results import SAMPLES, GradedProblem, read_grades
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)

FIGURES = ["logistic_map/exact", "logistic_map/step_accuracy/mean", "logistic_map/state_collapse"]
TASKS = [
    "train.tasks=[logistic_map]",
    "train.tasks_every=8",
    "train.tasks_limit=4",
    "train.samples=3",
]
SHORT = ["train.task_settings={logistic_map: {max_new_tokens: 8}}"]


def evaluations(config) -> list[dict]:
    return [line for line in read(folder_of(config) / "metrics.jsonl") if "eval/loss" in line]


def learned(config) -> tuple[list, bytes]:
    """Every loss and norm of a run, and its adapter."""
    lines = read(folder_of(config) / "metrics.jsonl")
    names = ("train/loss", "train/grad_norm", "eval/loss", "spectrum/effective_rank/mean")
    [adapter] = (folder_of(config) / "adapter").glob("*model.safetensors")
    return [[line.get(name) for name in names] for line in lines], adapter.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        pytest.param(
            ["train.batch_layout=padded", "model.gradient_checkpointing=true"],
            marks=pytest.mark.nightly,
        ),
        pytest.param(["adapter=full", "adapter.r=null"], marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_to_the_bit_what_it_learns_without_tasks_and_samples(tiny_config, settings):
    """Dropout draws random numbers, and attention runs over flat rows: neither notices the answers
    in between."""
    plain = tiny_config(*settings, "name=plain")
    examined = tiny_config(*settings, *TASKS, *SHORT, "name=examined")
    train(plain)
    train(examined)
    assert learned(examined) == learned(plain)
    assert not (folder_of(plain) / "samples.jsonl").exists()


def test_answers_and_figures_are_those_of_cera_eval(tiny_config, compose, capsys):
    config = tiny_config(*TASKS, "train.samples=4", "train.max_updates=4", "train.tasks_every=null")
    result = train(config)
    printed = capsys.readouterr().out
    assert (
        "4 problems of logistic_map, up to 64 tokens each, at the end; 4 samples at each "
        "evaluation\n" in printed
    )
    assert (printed.count("(4 problems of logistic_map in "), printed.count("4 samples in ")) == (
        1,
        1,  # at the end, the samples are the first answers to the task
    )
    evaluated = evaluate(
        compose(f"run={folder_of(config)}", "task=logistic_map", "task.limit=4", command="eval")
    )
    folder = folder_of(config) / "eval" / "logistic_map"
    samples = [line for line in read(folder_of(config) / "samples.jsonl") if line["update"] == 4]
    assert [line["answer"] for line in samples] == [
        line["text"] for line in read(folder / "generations.jsonl")
    ]
    assert [line["prompt"] for line in samples] == [
        line["prompt"] for line in read(folder / "problems.jsonl")
    ]
    graded = read(folder / "grades.jsonl")
    assert [line["exact"] for line in samples] == [line["exact"] for line in graded]
    assert read_grades(folder_of(config), "logistic_map") == [
        GradedProblem(line["problem"], sum(line["matches"]) / len(line["matches"]), line["ending"])
        for line in graded
    ]
    assert [result[name] for name in FIGURES] == [
        evaluated["exact/pass@1"],
        evaluated["step_accuracy/mean"],
        evaluated["state_collapse"],
    ]


@pytest.fixture
def half_right(monkeypatch):
    """Every second answer is the gold one."""

    def answer(self, exam):
        texts = [
            problem.gold if index % 2 == 0 else "nothing"
            for index, problem in enumerate(exam.problems)
        ]
        return [
            Generation(problem.id, 0, text, 1, False)
            for problem, text in zip(exam.problems, texts, strict=True)
        ]

    monkeypatch.setattr(Exams, "answer", answer)


def test_figures_reach_every_place_where_a_run_shows_them(tiny_config, half_right, capsys):
    config = tiny_config(*TASKS, *SHORT)
    result = train(config)
    lines = evaluations(config)
    assert [[name for name in FIGURES if name in line] for line in lines] == [
        FIGURES,
        [],
        FIGURES,
        FIGURES,
    ]
    assert (
        [result[name] for name in FIGURES]
        == [lines[-1][name] for name in FIGURES]
        == [0.5, 0.5, 0.0]
    )
    assert json.loads((folder_of(config) / "result.json").read_text()) == result
    samples = read(folder_of(config) / "samples.jsonl")
    assert [(line["update"], line["exact"]) for line in samples] == [
        (update, exact) for update in (0, 4, 8, 12) for exact in (True, False, True)
    ]
    printed = capsys.readouterr().out
    before, _, _ = printed.partition("\nanswers at update 0: ")
    assert re.search(r"\nnow        answers \d+ problems of logistic_map$", before)
    assert (
        "\ntasks           logistic_map exact 50.0% before, 50.0% after, step_accuracy/mean 50.0% "
        "before, 50." in printed
    )
    asked = " ".join(samples[0]["prompt"].split())
    truth = samples[0]["gold"]
    assert (
        f"\nasked           {asked}\nbefore          {truth}\nafter           {truth}\nright      "
        f"     {truth}" in printed
    )


def test_samples_without_a_prompt_are_refused(tiny_config, write_jsonl):
    rows = write_jsonl("text.jsonl", [{"text": f"document {number}"} for number in range(40)])
    config = tiny_config(
        "data=jsonl", f"data.train_files=[{rows}]", "data.layout=documents", "train.samples=2"
    )
    with pytest.raises(UserError, match="train.samples=2: no held-out row has a prompt"):
        train(config)


def test_a_run_that_was_cut_ends_with_the_figures_and_samples_of_one_that_was_not(
    tiny_config, half_right
):
    whole, cut = (
        tiny_config(*TASKS, *SHORT, "train.max_updates=8", f"name={name}")
        for name in ("whole", "cut")
    )
    result = train(whole)
    train_and_die_after(cut, 8, log=SAMPLES)
    assert read(folder_of(cut) / "samples.jsonl")[-1]["update"] == 8
    resumed = train(cut)
    for name in ("samples.jsonl", "grades/logistic_map.jsonl"):
        assert (folder_of(cut) / name).read_bytes() == (folder_of(whole) / name).read_bytes()
    assert [resumed[name] for name in FIGURES] == [result[name] for name in FIGURES]
    assert [[line.get(name) for name in FIGURES] for line in evaluations(cut)] == [
        [line.get(name) for name in FIGURES] for line in evaluations(whole)
    ]


def test_a_run_that_patience_ends_answers_its_tasks_at_its_end(tiny_config, half_right):
    settings = [*TASKS, *SHORT, "train.tasks_every=null", "train.max_updates=100"]
    config = tiny_config(*settings, "optimizer.lr=3", "train.eval_every=2", "train.patience=2")
    result = train(config)
    assert result["updates"] == result["best_update"] + 4 < 100
    assert [result[name] for name in FIGURES] == [0.5, 0.5, 0.0]
    assert len(read_grades(folder_of(config), "logistic_map")) == 4


def test_without_tasks_the_samples_are_the_first_evaluation_rows_with_their_references(tiny_config):
    config = tiny_config("train.samples=2", "train.max_updates=1")
    result = train(config)
    assert not [name for name in result if name.startswith("logistic_map")]
    samples = read(folder_of(config) / "samples.jsonl")
    assert [line["update"] for line in samples] == [0, 0, 1, 1]
    assert [list(line) for line in samples] == [
        ["update", "task", "prompt", "answer", "gold", "exact"]
    ] * 4
    assert {(line["task"], line["exact"]) for line in samples} == {(None, None)}
    assert samples[0]["prompt"].startswith("Question: x' = 3.5 x (1 - x). Starting from x = 0.24")
    assert samples[0]["gold"] == "0.64, 0.81, 0.54, 0.87, 0.40, 0.84"


def test_answers_of_a_server_must_fit_its_context(tiny_config):
    with playing_vllm(tiny_config().model) as vllm:
        vllm.served.update(max_model_len=16)
        with pytest.raises(
            UserError, match=r"^train.tasks=\[logistic_map\]: .* beyond the 16 positions"
        ):
            train(tiny_config(*TASKS, f"train.server={vllm.url}"))


def test_problems_that_are_trained_on_are_named_in_training_and_in_an_evaluation(
    tiny_config, compose, write_jsonl, one_verifier, capsys
):
    rows, questions = (write_jsonl(f"{name}.jsonl", QUESTIONS) for name in ("rows", "questions"))
    config = tiny_config(
        "data=gsm8k",
        "data.path=null",
        f"data.train_files=[{rows}]",
        "data.eval_rows=2",
        "train.max_updates=1",
        "train.tasks=[gsm8k]",
        f"train.task_settings={{gsm8k: {{files: [{questions}], max_new_tokens: 8}}}}",
    )
    shared = (
        "6 of its problems are among the training rows, such as '1 apples and 2 more, how many?'\n"
    )
    train(config)
    assert f"\nshared     gsm8k: {shared}" in capsys.readouterr().out
    settings = [
        f"run={folder_of(config)}",
        "task=gsm8k",
        f"task.files=[{questions}]",
        "task.max_new_tokens=8",
    ]
    evaluate(compose(*settings, command="eval"))
    assert f"\nshared     {shared}" in capsys.readouterr().out
    evaluate(compose(*settings, command="eval"))  # no answer is missing: nothing is compared
    assert "shared" not in capsys.readouterr().out


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]
TALK = [
    {"from": "human", "value": "hello"},
    {"from": "gpt", "value": "hi"},
    {"from": "human", "value": "and?"},
]


@pytest.mark.parametrize(
    ("row", "settings", "prompt", "gold"),
    [
        (
            {"q": "what is next?", "a": "it is 0.84"},
            ["data.prompt='Question: {q}'", "data.completion=' {a}'", "data.loss_on=all"],
            "Question: what is next?",
            "it is 0.84",
        ),
        (
            {"messages": CHAT},
            ["data.layout=messages"],
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
            "hello there",
        ),
        (
            {"conversations": [*TALK, {"from": "gpt", "value": "no"}]},
            ["data.layout=conversations", "data.turns=all", "data.chat=plain"],
            "User: hello\nAssistant:",
            "hi",
        ),
    ],
)
def test_a_sample_is_a_row_up_to_its_first_answer(
    tokenizer, compose, write_jsonl, row, settings, prompt, gold
):
    file = write_jsonl("rows.jsonl", [row] * 4)
    config = compose("data=jsonl", f"data.train_files=[{file}]", "data.eval_rows=2", *settings)
    rows = config.trained_rows
    exam = rows_exam(rows, 3, tokenizer, positions=256)
    assert [(problem.prompt, problem.gold) for problem in exam.problems] == [(prompt, gold)] * 2
    start = [] if "messages" in row else [tokenizer.bos_token_id]
    ids = (*start, *tokenizer(prompt, add_special_tokens=False).input_ids)
    assert [request.prompt_ids for request in exam.requests] == [ids] * 2
    assert len({request.problem for request in exam.requests}) == 2
    assert exam.max_new_tokens == SAMPLE_ROOM
    assert rows_exam(rows, 1, tokenizer, positions=len(ids) + SAMPLE_ROOM).requests
    assert not rows_exam(rows, 1, tokenizer, positions=len(ids) + SAMPLE_ROOM - 1).requests


@pytest.mark.slow
def test_two_processes_share_the_answers_out_and_record_what_one_does(tiny_config, tmp_path):
    settings = [*TASKS, *SHORT, "train.max_updates=4", "adapter.dropout=0"]
    config = tiny_config(*settings, "name=one")
    train(config)
    settings += [f"model.path={config.model.path}", *TINY, "adapter.r=4"]
    settings += [
        "optimizer.lr=1e-2",
        "train.batch_size=16",
        "train.eval_every=4",
        f"output_dir={config.output_dir}",
    ]
    train_in_processes([[*settings, "name=two"]], 2, tmp_path)
    one, two = (read(Path(config.output_dir, name, "samples.jsonl")) for name in ("one", "two"))
    # Samples of the untouched model; later ones differ by the rounding of gradient sums.
    assert two[:3] == one[:3]
    assert [list(line.items())[:3] for line in two] == [list(line.items())[:3] for line in one]
    figures = [
        [line.get(name) for name in FIGURES] for line in evaluations(replace(config, name="two"))
    ]
    assert figures == [[line.get(name) for name in FIGURES] for line in evaluations(config)]
