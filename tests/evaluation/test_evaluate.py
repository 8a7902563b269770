"""Evaluations: what those with answers leave, what can be evaluated, that a cut changes nothing,
what is refused; and that perplexity and spectra are those of training and of the model itself."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from evaluated_runs import (
    QUESTIONS,
    chat,
    contents,
    evaluate,
    read,
)
from made_files import write_lines
from safetensors.torch import load_file, save_file
from tiny_runs import Cut
from transformers import AutoModelForCausalLM

from cera_train.common.errors import UserError
from cera_train.common.files import read_json, read_yaml
from cera_train.data.computed import logistic_map_rows
from cera_train.evaluation import engine
from cera_train.evaluation.evaluate import resolve_evaluation
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.requests import Answer
from cera_train.report.comparison import paired_tests
from cera_train.report.readers import read_runs
from cera_train.runs.evaluation_folder import ENDINGS, EvaluationFolder, Generation
from cera_train.runs.records import load_config
from cera_train.runs.subject import find_subject
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)


def multiply_weights(adapter: Path, factor: float) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: factor * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


def test_what_an_evaluation_leaves_and_that_it_grades_again_without_a_model(
    eval_config, run, tiny_folder, monkeypatch
):
    result = evaluate(eval_config())
    folder = run / "eval" / "gsm8k"
    problems, answers, grades = (
        read(folder / f"{name}.jsonl") for name in ("problems", "generations", "grades")
    )
    assert [problem["question"] for problem in problems] == [row["question"] for row in QUESTIONS]
    assert [problem["gold"] for problem in problems][-3:] == ["1001", "6", "18"]
    assert problems[0]["prompt"] == f"Question: {QUESTIONS[0]['question']}\nAnswer:"
    ids = [problem["id"] for problem in problems]
    assert [(row["problem"], row["sample"]) for row in answers] == [(name, 0) for name in ids]
    assert [row["problem"] for row in grades] == ids
    assert read_json(folder / "result.json") == result
    assert (result["problems"], result["samples"]) == (8, 1)
    for ending in ENDINGS:
        assert result[f"ending/{ending}"] == sum(row["ending"] == ending for row in grades) / 8
    assert result["tokens"] == sum(row["tokens"] for row in answers)
    config = read_yaml(folder / "config.yaml")
    assert (config["task"]["max_new_tokens"], config["model"]["path"]) == (8, str(tiny_folder))

    answers[0]["text"] = " It is #### 3"
    write_lines(folder / "generations.jsonl", answers)
    monkeypatch.setattr(engine, "load_model", None)
    again = evaluate(eval_config("launch.processes=1"))
    assert again["exact/pass@1"] == result["exact/pass@1"] + 1 / 8
    assert read_json(folder / "result.json") == again
    assert read(folder / "grades.jsonl")[0]["exact"]


def test_interrupted_equals_uninterrupted(eval_config, run, monkeypatch):
    """The last answer is cut within its line."""
    words = ("generation=sample", "generation.samples=3")
    whole = evaluate(eval_config(*words, "name=whole"))
    generated = []
    generate = LoadedModel.generate

    def die_at_the_third(self, batch, *more):
        generated.append(len(batch))
        if len(generated) == 3:
            raise Cut
        return generate(self, batch, *more)

    monkeypatch.setattr(LoadedModel, "generate", die_at_the_third)
    with pytest.raises(Cut):
        evaluate(eval_config(*words))
    answers = run / "eval" / "gsm8k" / "generations.jsonl"
    assert len(read(answers)) == sum(generated[:2])
    *whole_lines, _ = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(whole_lines) + b'{"text": "\\\\boxed{3}')

    assert evaluate(eval_config(*words)) == whole | {"task": "gsm8k"}
    assert contents(run / "eval" / "gsm8k") == contents(run / "eval" / "whole")
    assert sum(generated[3:]) == 8 * 3 - sum(generated[:2]) + 1
    assert len({answer["text"] for answer in read(answers)}) > 8  # samples differ


def test_samples_give_pass_at_k_for_every_k(eval_config, monkeypatch, capsys):
    """Problem i has i right answers of 3."""
    problems = resolve_evaluation(eval_config("task.limit=4")).problems
    right = {
        (problem.id, sample): problem.gold
        for index, problem in enumerate(problems)
        for sample in range(index)
    }

    def generate(self, batch, *_):
        for each in batch:
            text = f"#### {right.get((each.problem, each.sample), 'none')}"
            yield [Answer(Generation(each.problem, each.sample, text, 1, False), [])]

    monkeypatch.setattr(LoadedModel, "generate", generate)
    result = evaluate(eval_config("task.limit=4", "generation=sample", "generation.samples=3"))
    assert result["exact/pass@1"] == pytest.approx((0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert result["exact/pass@2"] == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)
    assert result["exact/pass@3"] == result["verified/pass@3"] == pytest.approx(3 / 4)
    lower, upper = result["exact/pass@3/interval"]
    assert 0 <= lower < 3 / 4 < upper <= 1
    assert result["no_answer"] == 6
    interval = f"exact pass@3     75.0%  (95 % interval {lower:.1%} to {upper:.1%})"
    assert interval in capsys.readouterr().out


def test_logistic_map_asks_the_held_out_starts(eval_config, run):
    """Of r = 3.5, on which the run was trained."""
    data = load_config(run / "config.yaml").data
    problems = resolve_evaluation(eval_config(task="logistic_map")).problems
    assert len(problems) == 3 * 20
    _, held_out = logistic_map_rows(data.logistic_map, data.eval_rows)
    asked = {problem.prompt for problem in problems if problem.details["growth"] == 3.5}
    assert asked == {row["prompt"] for row in held_out}


# --- what can be evaluated ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "name", "part"),
    [
        ("adapter", ".", ""),
        ("checkpoints/12", ".", "-checkpoints-12"),
        ("checkpoints", "12", "-checkpoints-12"),
    ],
)
def test_an_adapter_belongs_to_its_run_wherever_a_command_starts(
    eval_config, run, monkeypatch, inside, name, part
):
    monkeypatch.chdir(run / inside)
    subject = find_subject(eval_config(run=name))
    assert (subject.folder, subject.part) == (run, part)
    assert subject.run == load_config(run / "config.yaml")


def test_the_untouched_model_is_asked_as_a_run_is(
    tiny_config, compose, one_verifier, tmp_path, tiny_folder
):
    """On its held-out rows, by its template; a report does not test it against one that is not."""
    run = Path(train(tiny_config("data.chat=template", "train.max_updates=2"))["folder"])

    def answered(output: str, *settings: str, task: str = "logistic_map") -> Path:
        common = [f"task={task}", "task.limit=3", "task.max_new_tokens=8"]
        evaluate(compose(*common, *settings, f"output_dir={tmp_path / output}", command="eval"))
        return next((tmp_path / output).glob("base-*"), run)

    answered("outputs", f"run={run}")
    like = answered("outputs", "run=base", f"like={run}")
    asked, again = (folder / "eval" / "logistic_map" / "problems.jsonl" for folder in (run, like))
    assert "<|im_start|>" in asked.read_text()
    assert asked.read_bytes() == again.read_bytes()
    answered("outputs", "run=base", f"like={run}", task="held_out")
    base = ("model=smollm2_135m", f"model.path={tiny_folder}", "model.dtype=float32")
    plain = answered("plain", "run=base", *base)
    assert not paired_tests(read_runs([run, like]))[1]
    tests, [note] = paired_tests(read_runs([run, plain]))
    assert not tests
    assert "prompts differ: chat markup and plain text: evaluate both alike" in note


# --- mistakes -------------------------------------------------------------------------------------


def test_a_folder_of_other_settings_problems_weights_or_in_use_is_refused(
    eval_config, run, questions
):
    evaluate(eval_config("task.limit=2"))
    with (
        EvaluationFolder.open(run / "eval" / "gsm8k"),
        pytest.raises(ValueError, match="another evaluation is writing"),
    ):
        evaluate(eval_config("task.limit=2"))
    with pytest.raises(ValueError, match=r"task.limit was 2, is 3.*Set name="):
        evaluate(eval_config("task.limit=3"))
    best = eval_config("task.limit=2", run=run / "best")
    evaluate(best)
    multiply_weights(run / "best", 2)
    with pytest.raises(ValueError, match=r"adapter_digest was .*Set name="):
        evaluate(best)
    questions.write_text(questions.read_text().replace("1 apples", "one apple"))
    with pytest.raises(ValueError, match="a data file changed"):
        evaluate(eval_config("task.limit=2"))


def test_an_adapter_of_another_base_model_is_refused(eval_config, run, tmp_path, tokenizer):
    settings = ["model=smollm2_135m", f"model.path={tmp_path / 'other'}", "model.dtype=float32"]
    tokenizer.save_pretrained(tmp_path / "other")

    sibling = make_tiny_llama(vocab_size=len(tokenizer))
    sibling.model.layers[0].mlp.up_proj.weight.data += 0.1
    sibling.save_pretrained(tmp_path / "other")
    differs = r"was trained on another base than .*: other weights\. It belongs"
    for quantization in ("none", "nf4"):
        with pytest.raises(UserError, match=differs):
            evaluate(eval_config(*settings, f"model.quantization={quantization}"))
    with pytest.raises(UserError, match=differs):
        chat(run, *settings, "prompt=Hello", "server=http://127.0.0.1:9")
    assert not (run / "eval").exists()
    (run / "environment.json").unlink()  # as an adapter that was carried elsewhere
    make_tiny_llama(vocab_size=len(tokenizer), hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to another base model"):
        evaluate(eval_config(*settings, "name=again"))


def test_another_adapter_in_a_runs_place_is_refused(eval_config, run, tiny_config):
    replaced = f"{run}/adapter is not the adapter that its run left: it was replaced"
    shutil.copy(run / "checkpoints" / "8" / "adapter_model.safetensors", run / "adapter")
    for named in (run, run / "adapter"):
        with pytest.raises(UserError, match=f"^{replaced}"):
            evaluate(eval_config(run=named))
    with pytest.raises(UserError, match=f"^{replaced}"):
        train(tiny_config("name=later", f"adapter.start_from={run}"))
    assert not (run / "eval").exists()


def test_an_adapter_that_diverged_is_refused(eval_config, run):
    best = run / "best"
    multiply_weights(best, 1e38)
    for sampled in ([], ["generation=sample", "name=sampled"]):
        with pytest.raises(ValueError, match="logits are not finite"):
            evaluate(eval_config("task.limit=2", *sampled, run=best))
    multiply_weights(best, math.nan)
    with pytest.raises(
        UserError, match=r"best: \S+ is not finite: its training diverged. Restore the file"
    ):
        evaluate(eval_config(run=best))


def test_perplexity_and_spectra_of_a_saved_run_are_those_logged_in_training(eval_config, run):
    """On the held-out rows, of which a limit takes the first: it never adds a training row."""
    trained = read_json(run / "result.json")
    result = evaluate(eval_config("task.limit=60", task="perplexity"))
    assert result["rows"] == 20
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)
    assert result["perplexity_base"] == pytest.approx(trained["perplexity_before"], rel=1e-6)
    for kind in ("effective_rank", "manifold_dimension"):
        for of in ("mean", "max"):
            name = f"spectrum/{kind}/{of}"
            assert result[name] == pytest.approx(trained[name], rel=1e-6)
    limited = evaluate(eval_config("task.limit=7", "name=limited", task="perplexity"))
    assert limited["rows"] == 7


@pytest.mark.parametrize(
    "trained",
    [
        ["adapter=full", "adapter.r=null"],
        ["adapter.r=4", "+adapter.settings.modules_to_save=[norm,embed_tokens]"],
    ],
)
def test_float32_weights_beside_a_16_bit_base_are_read_in_float32(tiny_config, compose, trained):
    settings = ["model.dtype=bfloat16", "train.max_updates=4", "optimizer.lr=1e-2"]
    run = train(tiny_config(*trained, *settings))
    result = evaluate(compose(f"run={run['folder']}", "task=perplexity", command="eval"))
    assert result["perplexity"] == run["eval/perplexity"]


def test_forgetting_is_the_perplexity_of_every_window(eval_config, run, tokenizer, tmp_path):
    """Against the model's own loss, window by window, with the adapter and without."""
    text = "the next value is hello there " * 20
    (tmp_path / "text.txt").write_text(text)
    settings = [f"task.files=[{tmp_path / 'text.txt'}]", "task.window=32"]
    result = evaluate(eval_config(*settings, task="forgetting"))

    model = AutoModelForCausalLM.from_pretrained(read_yaml(run / "config.yaml")["model"]["path"])
    start = tokenizer("").input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(start) == 1
    losses = 0.0
    for first in range(0, len(ids), 31):
        window = torch.tensor([start + ids[first : first + 31]])
        with torch.no_grad():
            losses += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    assert result["tokens"] == len(ids)
    assert result["perplexity_base"] == pytest.approx(math.exp(losses / len(ids)), rel=1e-5)
    assert result["perplexity"] != pytest.approx(result["perplexity_base"], rel=1e-3)

    (tmp_path / "text.txt").write_text(text + "there")
    with pytest.raises(UserError, match="forgetting has the perplexity of other rows: "):
        evaluate(eval_config(*settings, task="forgetting"))
