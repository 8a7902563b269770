"""Accuracy and samples while a run trains: cera-eval's figures, and a training that does not
notice."""

import json
import re

import pytest
from evaluated_runs import QUESTIONS, evaluate, read
from tiny_runs import folder_of

from cera_train.evaluation.task_evaluation import SAMPLE_ROOM, TaskEvaluations, evaluation_of_rows
from cera_train.runs.evaluation_folder import Generation
from cera_train.runs.results import GradedProblem, read_grades
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


def test_a_run_learns_to_the_bit_what_it_learns_without_tasks_and_samples(tiny_config):
    """Dropout draws random numbers, and attention runs over flat rows: neither notices the answers
    in between."""
    plain = tiny_config("name=plain")
    examined = tiny_config(*TASKS, *SHORT, "name=examined")
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

    def answer(self, evaluation):
        texts = [
            problem.gold if index % 2 == 0 else "nothing"
            for index, problem in enumerate(evaluation.problems)
        ]
        return [
            Generation(problem.id, 0, text, 1, False)
            for problem, text in zip(evaluation.problems, texts, strict=True)
        ]

    monkeypatch.setattr(TaskEvaluations, "answer", answer)


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
    rows = config.data
    evaluation = evaluation_of_rows(rows, 3, tokenizer, positions=256)
    asked = [(problem.prompt, problem.gold) for problem in evaluation.problems]
    assert asked == [(prompt, gold)] * 2
    start = [] if "messages" in row else [tokenizer.bos_token_id]
    ids = (*start, *tokenizer(prompt, add_special_tokens=False).input_ids)
    assert [request.prompt_ids for request in evaluation.requests] == [ids] * 2
    assert len({request.problem for request in evaluation.requests}) == 2
    assert evaluation.max_new_tokens == SAMPLE_ROOM
    assert evaluation_of_rows(rows, 1, tokenizer, positions=len(ids) + SAMPLE_ROOM).requests
    assert not evaluation_of_rows(rows, 1, tokenizer, positions=len(ids) + SAMPLE_ROOM - 1).requests
