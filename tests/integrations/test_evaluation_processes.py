"""An evaluation in several processes over gloo: the answers and figures of one, whoever starts
them; one error, and one end, for all."""

import signal
import sys
from pathlib import Path

import pytest
from commands import python
from evaluated_runs import contents, evaluate, read
from made_files import write_lines
from several_processes import popen
from tiny_runs import wait_until

from cera_train.common.files import read_json

pytest_plugins = ("evaluated_runs",)

CERA_EVAL = str(Path(sys.executable).parent / "cera-eval")


def answering(run: Path, questions: Path, *arguments: str, tokens: int = 8) -> list[str]:
    settings = [
        f"task.files=[{questions}]",
        f"task.max_new_tokens={tokens}",
        "generation.batch_tokens=150",
    ]
    return [CERA_EVAL, f"run={run}", "task=gsm8k", *settings, *arguments]


@pytest.mark.slow
def test_one_command_shares_the_answers_out_and_prints_once(eval_config, run, questions, tmp_path):
    """The answers that one process gives, each generated once."""
    one = evaluate(eval_config("name=one"))
    out = python(*answering(run, questions, "launch.processes=2", "name=two"), cwd=tmp_path)
    folder = run / "eval"
    assert contents(folder / "two") == contents(folder / "one")  # and no file of a process is left
    two = read_json(folder / "two" / "result.json")
    assert two == one | {"task": "two"}
    assert out.count("folder          ") == out.count("evaluate   ") == 1
    assert "1 more at work" in out


@pytest.mark.slow
def test_perplexity_and_spectra_are_those_of_one_process(eval_config, run, tmp_path):
    one = evaluate(eval_config("name=one", task="perplexity"))
    python(
        CERA_EVAL, f"run={run}", "task=perplexity", "launch.processes=2", "name=two", cwd=tmp_path
    )
    two = read_json(run / "eval" / "two" / "result.json")
    figures = {key: value for key, value in one.items() if not isinstance(value, str)}
    assert {key: two[key] for key in figures} == pytest.approx(figures, rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_one_process_resumes(eval_config, run, questions, tmp_path):
    rows = [{"question": f"{n} and {n}?" + "?" * n, "answer": f"#### {2 * n}"} for n in range(40)]
    write_lines(questions, rows)
    process = popen(
        *answering(run, questions, "launch.processes=2", "name=cut", tokens=64), cwd=tmp_path
    )
    answers = run / "eval" / "cut" / "generations.1.jsonl"
    wait_until(lambda: answers.exists() and answers.read_text().count("\n") > 1, every=0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    evaluating = [
        path
        for path in map(Path("/proc").joinpath, children)
        if b"spawn_main" in (path / "cmdline").read_bytes()
    ]
    assert len(evaluating) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "loading    PyTorch and transformers\n")
    assert out.count("stopped    the answers so far are kept") == 1
    assert not any(path.exists() for path in evaluating)
    kept = [line for path in answers.parent.glob("generations*.jsonl") for line in read(path)]
    assert 1 < len(kept) < 40
    evaluate(eval_config("task.max_new_tokens=64", "name=cut"))
    whole = read(answers.with_name("generations.jsonl"))
    assert len(whole) == 40
    assert all(line in whole for line in kept)
