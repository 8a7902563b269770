"""Accuracy and samples while a run trains: cera-eval's figures, and a training that does not
notice."""

from evaluated_runs import QUESTIONS, evaluate, read
from tiny_runs import adapter_bytes, evaluations_of, folder_of, timeless_metrics

from cera_train.common.files import read_json
from cera_train.runs.results import GradedProblem, read_grades
from cera_train.settings.training import TrainConfig
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


def test_a_run_learns_to_the_bit_what_it_learns_without_tasks_and_samples(
    finished_config, tiny_config
):
    """Dropout draws random numbers, and attention runs over flat rows: neither notices the answers
    in between."""
    examined = tiny_config(*TASKS, *SHORT)
    result = train(examined)
    assert adapter_bytes(examined) == adapter_bytes(finished_config)
    plain = timeless_metrics(finished_config)
    for expected, line in zip(plain, timeless_metrics(examined), strict=True):
        assert expected.items() <= line.items()
    assert not (folder_of(finished_config) / "samples.jsonl").exists()

    lines = evaluations_of(examined)
    reached = [[name for name in FIGURES if name in line] for line in lines]
    assert reached == [FIGURES, [], FIGURES, FIGURES]
    assert [result[name] for name in FIGURES] == [lines[-1][name] for name in FIGURES]
    assert read_json(folder_of(examined) / "result.json") == result
    samples = read(folder_of(examined) / "samples.jsonl")
    assert [line["update"] for line in samples] == [0] * 3 + [4] * 3 + [8] * 3 + [12] * 3


def test_answers_and_figures_are_those_of_cera_eval(tiny_config, compose, capsys):
    config = tiny_config(*TASKS, "train.samples=4", "train.max_updates=4", "train.tasks_every=null")
    result = train(config)
    printed = capsys.readouterr().out
    assert printed.count("(4 problems of logistic_map in ") == 1
    # At the end, the samples are the first answers to the task.
    assert printed.count("4 samples in ") == 1
    evaluated = evaluate(
        compose(f"run={folder_of(config)}", "task=logistic_map", "task.limit=4", command="eval")
    )
    folder = folder_of(config) / "eval" / "logistic_map"
    samples = [line for line in read(folder_of(config) / "samples.jsonl") if line["update"] == 4]
    problems, answers, graded = (
        read(folder / f"{name}.jsonl") for name in ("problems", "generations", "grades")
    )
    for sample, problem, answer, grade in zip(samples, problems, answers, graded, strict=True):
        assert sample["prompt"] == problem["prompt"]
        assert sample["answer"] == answer["text"]
        assert sample["exact"] == grade["exact"]
    assert read_grades(folder_of(config), "logistic_map") == [
        GradedProblem(line["problem"], line["score"], line["ending"]) for line in graded
    ]
    assert [result[name] for name in FIGURES] == [
        evaluated["exact/pass@1"],
        evaluated["step_accuracy/mean"],
        evaluated["state_collapse"],
    ]


def test_problems_that_are_trained_on_are_named_in_training_and_in_an_evaluation(
    tiny_config, eval_config, write_jsonl, questions, capsys
):
    config = tiny_config(
        "data=gsm8k",
        "data.path=null",
        f"data.train_files=[{write_jsonl('rows.jsonl', QUESTIONS)}]",
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
    evaluate(eval_config(run=folder_of(config)))
    assert f"\nshared     {shared}" in capsys.readouterr().out
    evaluate(eval_config(run=folder_of(config)))  # no answer is missing: nothing is compared
    assert "shared" not in capsys.readouterr().out


def test_a_task_without_settings_of_its_own_has_those_of_its_file():
    train = TrainConfig(tasks=["held_out"], task_settings={"held_out": None}, tasks_limit=3)
    assert train.changes_of_task("held_out") == {"limit": 3}
