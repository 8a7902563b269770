"""Runs on mixtures: of data sets, and of experts."""

import pytest
from evaluated_runs import evaluate
from tiny_runs import train_and_die_after

from cera_train.training.train import train


@pytest.fixture
def mixed(tiny_config, write_jsonl):
    """mixed("train.seed=1", ...) -> Config of a run on 30 and 6 rows, 2 : 1"""
    for name, size in (("a", 32), ("b", 8)):
        write_jsonl(
            f"{name}.jsonl",
            [{"prompt": f"{name}{row} is", "completion": f" {row}"} for row in range(size)],
        )
    folder = write_jsonl("c.jsonl", []).parent

    def mixed(*overrides: str):
        a = f"{{train_files:[{folder}/a.jsonl],weight:2}}"
        b = f"{{train_files:[{folder}/b.jsonl],weight:1}}"
        files = f"data.mix=[{a},{b}]"
        return tiny_config(
            "data=jsonl", files, "data.eval_rows=2", "data.train_rows=27", *overrides
        )

    return mixed


def test_a_finished_run_on_a_mix_is_evaluated_and_described_by_part(
    mixed, compose, tmp_path, capsys
):
    trained = train(mixed("train.max_updates=2"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "part a.jsonl: 18 sequences an epoch, of 30 (66.67%), " in printed
    run = f"run={trained['folder']}"
    result = evaluate(compose(run, "task=perplexity", command="eval"))
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)
    assert result["rows"] == 4
    card = (tmp_path / "outputs" / "run" / "adapter" / "README.md").read_text()
    assert "| Rows | a.jsonl + b.jsonl |" in card


def test_a_run_on_a_mix_does_not_resume_on_another(mixed, tmp_path):
    cut = mixed("name=cut")
    train_and_die_after(cut, 6)
    with pytest.raises(ValueError, match=r"data.mix.1.weight was 1.0, is 3.0. Set these back"):
        train(mixed("data.mix.1.weight=3", "name=cut"))
    rows = tmp_path / "a.jsonl"
    text = rows.read_text()
    rows.write_text(text + text.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="the training rows are not those of"):
        train(cut)
