"""Evaluations of tiny runs: their numbers are those of training, cutting them changes nothing, mistakes get a line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cera_train.evaluation.evaluate as evaluate_module
from cera_train.data import logistic_map as logistic_map_rows
from cera_train.evaluation.evaluate import evaluate
from cera_train.runs.recorded_config import load_config
from cera_train.tasks import gsm8k
from cera_train.training.train import train

QUESTIONS = [
    {"question": f"{a} apples and {b} more, how many{'?' * length}", "answer": f"Add them.\n#### {a + b}"}
    for a, b, length in [(1, 2, 1), (3, 4, 9), (10, 5, 3), (2, 2, 30), (7, 8, 5), (1_000, 1, 2), (6, 0, 17), (9, 9, 1)]
]


@pytest.fixture(scope="session")
def finished_run(compose, tiny_folder, tmp_path_factory) -> Path:
    """A short run of the tiny model on the logistic map, in float32."""
    output = tmp_path_factory.mktemp("evaluated")
    config = compose(
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "adapter.r=4", "name=run"),
        *("optimizer.lr=1e-2", "train.max_updates=6", "train.batch_size=16", f"output_dir={output}"),
    )
    return Path(train(config)["folder"])


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def questions(write_jsonl) -> Path:
    return write_jsonl("questions.jsonl", QUESTIONS)


@pytest.fixture
def eval_config(compose, run, questions):
    """eval_config("task.limit=3", ...): GSM8K's way with the tiny run, 8 new tokens, several batches."""

    def eval_config(*overrides: str, task: str = "gsm8k", run: Path | str = run):
        own = ["task.max_new_tokens=8", "generation.batch_tokens=150"]
        if task in ("gsm8k", "math"):
            own += [f"task.files=[{questions}]"]
        return compose(f"run={run}", f"task={task}", *own, *overrides, command="eval")

    return eval_config


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


# --- perplexity and spectra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["cera", "lora", "dora"])
def test_perplexity_and_spectra_of_a_saved_run_are_those_logged_in_training(tiny_config, compose, adapter):
    trained = train(tiny_config(f"adapter={adapter}", "adapter.r=4", "train.max_updates=4"))
    result = evaluate(compose(f"run={trained['folder']}", "task=perplexity", command="eval"))
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)
    assert result["perplexity_base"] == pytest.approx(trained["perplexity_before"], rel=1e-6)
    for kind in ("effective_rank", "manifold_dimension"):
        for of in ("mean", "max"):
            name = f"spectrum/{kind}/{of}"
            assert result[name] == pytest.approx(trained[name], rel=1e-6)
    assert result["tokens"] > 0


def test_perplexity_on_other_rows(eval_config, questions):
    result = evaluate(
        eval_config(
            *("data=jsonl", f"task.files=[{questions}]", "data.train_files=[unused.jsonl]", "data.eval_rows=1"),
            *(r"data.prompt='{question}'", r"data.completion=' {answer}'", "task.limit=5"),
            task="perplexity",
        )
    )
    assert result["rows"] == 5


@pytest.mark.parametrize(("limit", "rows"), [(7, 7), (60, 20)])
def test_a_limit_takes_the_first_held_out_rows_and_never_a_training_row(eval_config, run, limit, rows):
    result = evaluate(eval_config(f"task.limit={limit}", task="perplexity"))
    assert result["rows"] == rows


def test_a_window_beyond_the_models_positions_is_refused(eval_config, tmp_path):
    (tmp_path / "text.txt").write_text("hello there")
    with pytest.raises(ValueError, match="task.window=1024 is beyond the 256 positions"):
        evaluate(eval_config(f"task.files=[{tmp_path / 'text.txt'}]", task="forgetting"))


def test_files_of_a_run_whose_rows_are_computed_need_a_layout(eval_config, questions):
    with pytest.raises(ValueError, match="rows are computed, not read.*data=jsonl"):
        evaluate(eval_config(f"task.files=[{questions}]", task="perplexity"))


def test_forgetting_is_the_perplexity_of_every_window(eval_config, run, tokenizer, tmp_path):
    """Against the model's own loss, window by window, with the adapter and without."""
    text = "the next value is hello there " * 20
    (tmp_path / "text.txt").write_text(text)
    settings = [f"task.files=[{tmp_path / 'text.txt'}]", "task.window=32"]
    result = evaluate(eval_config(*settings, task="forgetting"))

    model = AutoModelForCausalLM.from_pretrained(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])
    start, ids = tokenizer("").input_ids, tokenizer(text, add_special_tokens=False).input_ids
    assert len(start) == 1
    losses, tokens = 0.0, 0
    for first in range(0, len(ids), 31):
        window = torch.tensor([start + ids[first : first + 31]])
        with torch.no_grad():
            losses += model(window, labels=window).loss.item() * (window.shape[1] - 1)
        tokens += window.shape[1] - 1
    assert tokens == len(ids) == result["tokens"]
    assert result["perplexity_base"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert result["perplexity"] != pytest.approx(result["perplexity_base"], rel=1e-3)
    untouched = evaluate(eval_config(*settings, *base(run), task="forgetting", run="base"))
    assert untouched["perplexity"] == pytest.approx(result["perplexity_base"], rel=1e-6)


def tiny_path(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["model"]["path"]


def base(run: Path) -> list[str]:
    """Settings that name the tiny base model, and where an untouched model's evaluations go."""
    return [
        "model=smollm2_135m",
        f"model.path={tiny_path(run)}",
        "model.dtype=float32",
        f"output_dir={run.parent / 'outputs'}",
    ]


def test_text_is_found_in_a_column_too(eval_config, write_jsonl):
    rows = write_jsonl("text.jsonl", [{"text": "hello there"}, {"text": ""}, {"text": "the next value"}])
    assert evaluate(eval_config(f"task.files=[{rows}]", "task.window=8", task="forgetting"))["tokens"] > 5


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_leaves_what_it_did(eval_config, run):
    result = evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    problems, answers, grades = (read(folder / f"{name}.jsonl") for name in ("problems", "generations", "grades"))
    assert [problem["question"] for problem in problems] == [row["question"] for row in QUESTIONS]
    assert [problem["gold"] for problem in problems] == ["3", "7", "15", "4", "15", "1001", "6", "18"]
    assert problems[0]["prompt"] == f"Question: {QUESTIONS[0]['question']}\nAnswer:"
    ids = [problem["id"] for problem in problems]
    assert [(row["problem"], row["sample"]) for row in answers] == [(name, 0) for name in ids]
    assert [row["problem"] for row in grades] == ids
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["problems"], result["samples"], result["missing"]) == (8, 1, 0)
    assert result["truncated"] == sum(row["truncated"] for row in answers)
    assert result["no_answer"] == sum(row["answer"] is None for row in grades)
    assert result["tokens"] == sum(row["tokens"] for row in answers)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["task"]["max_new_tokens"] == 8
    assert config["model"]["path"] == tiny_path(run)


def test_a_finished_evaluation_stands(eval_config, monkeypatch, capsys):
    result = evaluate(eval_config())
    monkeypatch.setattr(evaluate_module, "load_model", None)  # nothing is loaded for it
    assert evaluate(eval_config()) == result
    assert "truncated" in capsys.readouterr().out


class Cut(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("sampled", [[], ["generation=sample", "generation.samples=3"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("broken_line", [False, True])
def test_interrupted_equals_uninterrupted(eval_config, run, monkeypatch, tmp_path, capsys, sampled, broken_line):
    whole = evaluate(eval_config(*sampled))
    expected = contents(run / "eval" / "gsm8k")
    shutil.move(run / "eval", tmp_path / "whole")

    generated, generate = [], evaluate_module.generate

    def die_at_the_third(model, base, tokenizer, batch, config):
        if len(generated) == 2:
            raise Cut
        generated.append(len(batch))
        return generate(model, base, tokenizer, batch, config)

    monkeypatch.setattr(evaluate_module, "generate", die_at_the_third)
    with pytest.raises(Cut):
        evaluate(eval_config(*sampled))
    answers = run / "eval" / "gsm8k" / "generations.jsonl"
    assert len(read(answers)) == sum(generated)
    if broken_line:
        answers.write_bytes(answers.read_bytes()[:-9])

    again = []
    monkeypatch.setattr(evaluate_module, "generate", lambda *args: again.append(len(args[3])) or generate(*args))
    capsys.readouterr()
    result = evaluate(eval_config(*sampled))
    assert contents(run / "eval" / "gsm8k") == expected
    differs = {"tokens_per_s", "peak_memory_bytes"}
    assert {k: v for k, v in result.items() if k not in differs} == {k: v for k, v in whole.items() if k not in differs}
    answers_in_all = 8 * whole["samples"]
    assert sum(again) == answers_in_all - sum(generated) + (generated[-1] if broken_line else 0)
    assert (f"generations.jsonl:{sum(generated)} is broken" in capsys.readouterr().out) == broken_line


def test_samples_give_pass_at_k_for_every_k(eval_config, run, monkeypatch):
    """Answers made by hand: problem i has i right ones of 3."""
    golds = [row["answer"].split()[-1] for row in QUESTIONS[:4]]

    def by_hand(model, base, tokenizer, batch, config):
        texts = [
            f"#### {golds[index] if request.sample < index else 'none'}"
            for request in batch
            for index in [int(position[request.problem])]
        ]
        return [
            evaluate_module.Generation(request.problem, request.sample, text, 1, False)
            for request, text in zip(batch, texts, strict=True)
        ]

    problems = evaluate_module.load_problems(eval_config("task.limit=4").task, None)
    position = {problem.id: index for index, problem in enumerate(problems)}
    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    result = evaluate(eval_config("task.limit=4", "generation=sample", "generation.samples=3"))
    assert result["exact/pass@1"] == pytest.approx((0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert result["exact/pass@2"] == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)
    assert result["exact/pass@3"] == pytest.approx(3 / 4)
    assert result["verified/pass@3"] == pytest.approx(3 / 4)
    lower, upper = result["exact/pass@3/interval"]
    assert 0 <= lower < 3 / 4 < upper <= 1
    assert result["no_answer"] == 6


def test_grading_again_needs_no_model(eval_config, compose, run, monkeypatch):
    before = evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    rows = read(folder / "generations.jsonl")
    rows[0]["text"] = " It is #### 3"
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluate_module, "load_model", None)
    monkeypatch.setattr(evaluate_module, "load_tokenizer", None)
    shutil.rmtree(run / "adapter")
    result = evaluate(compose(f"grade={folder}", command="eval"))
    assert result["exact/pass@1"] == before["exact/pass@1"] + 1 / 8
    assert result["tokens_per_s"] == before["tokens_per_s"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert read(folder / "grades.jsonl")[0]["exact"]


def test_grading_a_cut_file_names_the_broken_line_and_grades_the_rest(eval_config, compose, run, capsys):
    evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    kept = (folder / "result.json").read_bytes()
    path = folder / "generations.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    grades = (folder / "grades.jsonl").read_bytes()
    result = evaluate(compose(f"grade={folder}", command="eval"))
    out = capsys.readouterr().out
    assert "generations.jsonl:8 is broken" in out
    assert "1 answers are missing" in out
    assert result["missing"] == 1
    assert (folder / "result.json").read_bytes() == kept
    assert (folder / "grades.jsonl").read_bytes() == grades
    evaluate(eval_config())  # the evaluation's own command redoes the line, finished as it was
    assert "generations.jsonl:8 is broken: its problem is answered again" in capsys.readouterr().out
    assert len(read(path)) == 8
    assert json.loads((folder / "result.json").read_text())["missing"] == 0


def test_math_from_a_file_is_graded_by_both_graders(eval_config, write_jsonl, run, monkeypatch):
    rows = [
        {"problem": "half of 1", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        {"problem": "half of 2", "level": "Level 5", "type": "Algebra", "solution": r"So $\boxed{1}$."},
    ]
    texts = {"half of 1": r"It is \boxed{0.5}.", "half of 2": r"It is \boxed{1}."}

    def by_hand(model, base, tokenizer, batch, config):
        return [evaluate_module.Generation(r.problem, 0, texts[question[r.problem]], 5, False) for r in batch]

    config = eval_config(f"task.files=[{write_jsonl('math.jsonl', rows)}]", task="math")
    question = {problem.id: problem.question for problem in evaluate_module.load_problems(config.task, None)}
    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    result = evaluate(config)
    assert (result["exact/pass@1"], result["verified/pass@1"]) == (0.5, 1.0)
    first = read(run / "eval" / "math" / "problems.jsonl")[0]
    assert (first["prompt"], first["gold"]) == ("Problem: half of 1\nSolution:", r"\frac{1}{2}")
    assert (first["level"], first["type"]) == ("Level 1", "Algebra")


def test_a_grader_that_crashes_counts_as_wrong_and_is_kept(eval_config, run, monkeypatch):
    extract = gsm8k.extract

    def crash(text):
        if "####" in text:  # a gold answer
            return extract(text)
        raise RecursionError("too deep")

    monkeypatch.setattr(gsm8k, "extract", crash)
    result = evaluate(eval_config("task.limit=2"))
    assert (result["exact/pass@1"], result["grader_failures"]) == (0.0, 2)
    assert read(run / "eval" / "gsm8k" / "grades.jsonl")[0]["failure"] == "crash: RecursionError: too deep"


def test_every_adapter_of_a_run_can_be_evaluated(eval_config, run, tmp_path):
    """The run's, its best, a checkpoint's, and one that was carried elsewhere. What is measured of best/ and
    checkpoints/ lies beside them: training replaces these folders."""
    evaluate(eval_config("task.limit=4"))
    elsewhere = Path(shutil.copytree(run / "adapter", tmp_path / "elsewhere"))
    generations = (run / "eval" / "gsm8k" / "generations.jsonl").read_bytes()
    evaluate(eval_config("task.limit=4", run=run / "checkpoints" / "6"))
    assert (run / "eval" / "gsm8k-checkpoints-6" / "generations.jsonl").read_bytes() == generations
    evaluate(eval_config("task.limit=4", *base(run)[:3], run=elsewhere))
    assert (elsewhere / "eval" / "gsm8k" / "generations.jsonl").read_bytes() == generations
    shutil.copy(run / "best" / "adapter_model.safetensors", tmp_path)  # other weights than the final adapter's
    assert evaluate(eval_config("task.limit=4", run=run / "best"))["task"] == "gsm8k-best"
    assert not list(run.glob("*/eval"))


def test_a_run_is_named_from_where_the_user_stands(eval_config, run, monkeypatch):
    for place, name in ((run.parent, "run/best"), (run, "best")):
        monkeypatch.chdir(place)
        evaluate(eval_config("task.limit=1", run=name))
        assert (run / "eval" / "gsm8k-best" / "result.json").exists()
        shutil.rmtree(run / "eval")


def test_the_card_tells_of_its_own_adapter_only(eval_config, run):
    weights = run / "best" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    evaluate(eval_config("task.limit=2", run=run / "best"))
    assert "gsm8k" not in (run / "adapter" / "README.md").read_text()
    evaluate(eval_config("task.limit=2"))
    text = (run / "adapter" / "README.md").read_text()
    assert text.count("gsm8k, exact pass@1") == 1
    assert "gsm8k-best" not in text


def test_the_untouched_model_has_a_folder_of_its_own(eval_config, run):
    evaluate(eval_config("task.limit=2", *base(run), run="base"))
    (folder,) = (run.parent / "outputs").glob("base-*")
    assert folder.name == f"base-{Path(tiny_path(run)).name}"
    assert len(read(folder / "eval" / "gsm8k" / "generations.jsonl")) == 2


def test_a_name_tells_two_evaluations_of_a_task_apart(eval_config, run):
    evaluate(eval_config("task.limit=2"))
    evaluate(eval_config("task.limit=2", r"task.prompt='Q: {question} A:'", "name=short"))
    first, second = (read(run / "eval" / name / "problems.jsonl") for name in ("gsm8k", "short"))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert second[0]["prompt"].startswith("Q: 1 apples")


# --- the logistic map ------------------------------------------------------------------------------------------------


def test_logistic_map_reports_steps_errors_collapse_and_the_papers_case(eval_config, run, monkeypatch, capsys):
    """Answers by hand: right at r = 3.5, one value repeated at r = 3.8, nothing at r = 3.2."""

    def by_hand(model, base, tokenizer, batch, config):
        def text(problem):
            if "paper_case" in problem.details:
                return " 0.8400, 0.8719, 0.8719, 0.8719, 0.8719"
            repeated = ", ".join([problem.gold.split(",")[0]] * 6)
            return {3.5: f" {problem.gold}", 3.8: f" {repeated}", 3.2: " I do not know."}[problem.details["growth"]]

        return [
            evaluate_module.Generation(request.problem, request.sample, text(by_id[request.problem]), 9, False)
            for request in batch
        ]

    config = eval_config("task.max_new_tokens=32", task="logistic_map")
    run_data = load_config(run / "config.yaml").data
    by_id = {problem.id: problem for problem in evaluate_module.load_problems(config.task, run_data)}
    assert len(by_id) == 3 * 20 + 1
    monkeypatch.setattr(evaluate_module, "generate", by_hand)
    result = evaluate(config)
    assert result["exact/pass@1"] == pytest.approx(1 / 3)
    own = result["by_growth"]
    assert (own["3.5"]["step_accuracy/mean"], own["3.5"]["absolute_error/mean"]) == (1.0, 0.0)
    assert own["3.8"]["state_collapse"] == 1.0
    assert own["3.2"] == {
        "step_accuracy/mean": 0.0,
        "absolute_error/mean": None,
        "steps_given": 0.0,
        "state_collapse": 0.0,
    }
    assert (result["problems"], result["steps_given"]) == (60, pytest.approx(2 / 3))  # the paper's case is not counted
    assert result["state_collapse"] == pytest.approx(1 / 3)
    assert result["no_answer"] == 20
    assert result["paper_case"] == {
        "truth": ["0.8400", "0.4704", "0.8719", "0.3908", "0.8333"],
        "answer": ["0.8400", "0.8719", "0.8719", "0.8719", "0.8719"],
        "collapsed": True,
    }
    assert "x2     0.4704   0.8719" in capsys.readouterr().out


def test_logistic_map_asks_from_the_starting_points_that_were_held_out(eval_config, run):
    config = load_config(run / "config.yaml")
    problems = evaluate_module.load_problems(eval_config(task="logistic_map").task, config.data)
    own = [problem for problem in problems if "paper_case" not in problem.details]
    _, held_out = logistic_map_rows.problems(config.data.logistic_map, config.data.eval_rows)
    asked = {problem.prompt for problem in own if problem.details["growth"] == 3.5}
    assert asked == {row["prompt"] for row in held_out}
    assert {problem.details["growth"] for problem in own} == {3.2, 3.5, 3.8}


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_refused(eval_config, run):
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"is unfinished.*same cera-train command.*run=.*best"):
        evaluate(eval_config())
    assert not (run / "eval").exists()


def test_a_run_without_its_adapter_is_refused(eval_config, run):
    shutil.rmtree(run / "adapter")
    with pytest.raises(ValueError, match="lacks its adapter"):
        evaluate(eval_config())


def test_a_folder_that_is_no_run_is_refused(eval_config, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(eval_config(run=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not the folder of a run"):
        evaluate(eval_config(run=tmp_path))


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}], ids=str)
def test_an_adapter_of_another_base_model_is_refused(eval_config, run, tmp_path, tokenizer, changes):
    make_tiny_llama(vocab_size=len(tokenizer), **changes).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other weights|belongs to another base model") as error:
        evaluate(eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"))
    assert len(str(error.value)) < 500
    assert not (run / "eval").exists()
    (run / "environment.json").unlink()  # as an adapter that was carried elsewhere
    with pytest.raises(ValueError, match="belongs to another base model"):
        evaluate(
            eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32", "name=again")
        )


def test_other_weights_of_the_same_shape_are_refused(eval_config, run, tmp_path, tokenizer):
    other = make_tiny_llama(vocab_size=len(tokenizer))
    other.model.norm.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other weights"):
        evaluate(eval_config("model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"))


def test_an_adapter_without_its_weights_is_refused_and_not_looked_for_on_the_hub(eval_config, run):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    for folder in (run, run / "adapter"):
        with pytest.raises(ValueError, match=r"adapter lacks its weights, adapter_model.safetensors"):
            evaluate(eval_config(run=folder))


def test_other_weights_in_the_same_folder_are_refused(eval_config, run):
    evaluate(eval_config("task.limit=2"))
    shutil.copy(run / "best" / "adapter_model.safetensors", run / "adapter")
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_digest was .*Set name="):
        evaluate(eval_config("task.limit=2"))


def test_an_adapter_that_diverged_is_refused(eval_config, run):
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    for sampled in ([], ["generation=sample", "name=sampled"]):
        with pytest.raises(ValueError, match="logits are not finite"):
            evaluate(eval_config("task.limit=2", *sampled))


def test_a_checkpoint_is_held_against_its_runs_base_too(eval_config, run, tmp_path, tokenizer):
    other = make_tiny_llama(vocab_size=len(tokenizer))
    other.model.norm.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    own = ["model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"]
    with pytest.raises(ValueError, match="was trained on other weights"):
        evaluate(eval_config(*own, run=run / "checkpoints" / "6"))


def test_a_damaged_adapter_is_refused(eval_config, run):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(eval_config())


def test_a_file_without_the_columns_of_the_task_is_refused(eval_config, write_jsonl):
    rows = write_jsonl("other.jsonl", [{"problem": "1 + 1", "answer": "#### 2"}])
    with pytest.raises(ValueError, match=r"gsm8k row 0: column 'question' is missing; the columns there are: problem"):
        evaluate(eval_config(f"task.files=[{rows}]"))


def test_a_mistake_before_the_first_answer_leaves_no_trace(eval_config, write_jsonl, run):
    """Nor does it bind the folder to its settings."""
    rows = write_jsonl("other.jsonl", [{"problem": "1 + 1"}])
    with pytest.raises(ValueError, match="is missing"):
        evaluate(eval_config(f"task.files=[{rows}]"))
    assert not (run / "eval").exists()
    assert evaluate(eval_config("task.limit=2"))["problems"] == 2


def test_other_settings_are_refused_and_named(eval_config):
    evaluate(eval_config("task.limit=2"))
    with pytest.raises(ValueError, match=r"task.limit was 2, is 3.*Set name="):
        evaluate(eval_config("task.limit=3"))


def test_other_problems_are_refused(eval_config, questions, run):
    evaluate(eval_config("task.limit=2"))
    (run / "eval" / "gsm8k" / "result.json").unlink()
    questions.write_text(questions.read_text().replace("1 apples", "one apple"))
    with pytest.raises(ValueError, match="a data file changed"):
        evaluate(eval_config("task.limit=2"))


def test_answers_beyond_the_models_positions_are_refused(eval_config):
    with pytest.raises(ValueError, match="beyond the 256 positions.*lower task.max_new_tokens"):
        evaluate(eval_config("task.max_new_tokens=250"))


def test_two_evaluations_do_not_write_to_one_folder(eval_config, run):
    with (
        evaluate_module.EvaluationFolder(run / "eval" / "gsm8k"),
        pytest.raises(ValueError, match="another evaluation is writing"),
    ):
        evaluate(eval_config())


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nothing", "does not exist"), ("", r"is not the folder of an evaluation.*Evaluations in it: .*eval/gsm8k")],
)
def test_grading_what_is_no_evaluation_is_refused(eval_config, compose, run, folder, message):
    evaluate(eval_config("task.limit=2"))
    with pytest.raises(ValueError, match=message):
        evaluate(compose(f"grade={run / folder}", command="eval"))


def test_grading_an_unfinished_run_by_mistake_leaves_it_alone(compose, run):
    (run / "result.json").unlink()
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ValueError, match="is not the folder of an evaluation"):
        evaluate(compose(f"grade={run}", command="eval"))
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_same_question_twice_is_two_problems(eval_config, write_jsonl, run):
    rows = write_jsonl("twice.jsonl", [QUESTIONS[0], QUESTIONS[0]])
    evaluate(eval_config(f"task.files=[{rows}]"))
    first, second = (row["id"] for row in read(run / "eval" / "gsm8k" / "problems.jsonl"))
    assert second == f"{first}-2"


def test_problems_of_one_level(eval_config, write_jsonl):
    levels = ["Level 5", "Level 1", 5, "Level ?"]
    rows = write_jsonl(
        "math.jsonl", [{"problem": f"p{n}", "solution": r"\boxed{1}", "level": level} for n, level in enumerate(levels)]
    )
    task = replace(eval_config(task="math").task, files=[str(rows)], level=5)
    assert [problem.question for problem in evaluate_module.load_problems(task, None)] == ["p0", "p2"]
