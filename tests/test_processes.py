"""Two real processes over gloo, started by torchrun, compute what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("train/loss", line.get("eval/loss")) for line in lines]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_write_once(tmp_path, tiny_folder):
    arguments = [
        *("-m", "cera_train", f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256"),
        # 79 rows in batches of 13: uneven shares, and epochs that end in a batch of one, with nothing for one process
        *("train.batch_size=13", "train.max_updates=20", "train.eval_every=8", "train.micro_batch_tokens=300"),
        *("adapter.r=4", "adapter.dropout=0"),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        done = subprocess.run(
            [*command, *arguments, f"name={name}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("folder          ") == 1
    one, two = losses(tmp_path / "outputs" / "one"), losses(tmp_path / "outputs" / "two")
    assert len(one) == 24
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_two_processes_share_the_answers_of_an_evaluation(tmp_path, tiny_folder, write_jsonl):
    """The same answers as one process gives, each generated once, and perplexity to rounding."""
    rows = [{"question": f"{n} and {n * n}" + "?" * n, "answer": f"#### {n + n * n}"} for n in range(9)]
    questions = write_jsonl("questions.jsonl", rows)
    scripts = Path(sys.executable).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]

    def run(*command: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(
        *(str(scripts / "cera-train"), f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256"),
        *("adapter.r=4", "train.max_updates=2", "name=run"),
    )
    evaluate = [str(scripts / "cera-eval"), "run=outputs/run"]
    answer = [
        *evaluate,
        "task=gsm8k",
        f"task.files=[{questions}]",
        "task.max_new_tokens=8",
        "generation.batch_tokens=90",
    ]
    measure = [*evaluate, "task=perplexity"]
    out = {"one": [run(*answer, "name=one"), run(*measure, "name=perplexity_one")]}
    out["two"] = [run(*launcher, *answer, "name=two"), run(*launcher, *measure, "name=perplexity_two")]
    folder = tmp_path / "outputs" / "run" / "eval"
    for name in ("problems", "generations", "grades"):
        assert (folder / "two" / f"{name}.jsonl").read_bytes() == (folder / "one" / f"{name}.jsonl").read_bytes()
    assert not list((folder / "two").glob("generations.*.jsonl"))
    lines = (folder / "two" / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "two" / "generations.jsonl").write_bytes(lines[0] + lines[5][:-7])  # cut, and unevenly so
    assert "generations.jsonl:2 is broken" in run(*launcher, *answer, "name=two")
    assert (folder / "two" / "generations.jsonl").read_bytes() == b"".join(lines)
    assert out["two"][0].count("folder          ") == 1
    assert "1 more at work" in out["two"][0]
    one, two = (json.loads((folder / f"perplexity_{name}" / "result.json").read_text()) for name in ("one", "two"))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
