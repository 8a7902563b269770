"""What answers cost while a run trains: how many there are, how long, and when."""

from __future__ import annotations

import pytest

from cera_train.planning.answers import DECODING_SHARE, LAYER_SECONDS, AnswerSize, step_seconds
from cera_train.planning.data_size import data_size
from cera_train.planning.devices import CPU_BANDWIDTH, GPUS, Device
from cera_train.planning.table import print_plan

QUICK = "+recipe=quickstart"


def sizes(compose, *overrides: str) -> list[AnswerSize]:
    from cera_train.planning.answers import sizes_of_tasks

    config = compose(QUICK, *overrides, command="plan")
    return sizes_of_tasks(config, data_size(config.data))


# --- how many, how long ----------------------------------------------------------------------------------------------


def test_a_task_of_the_hub_has_the_facts_of_its_rows(compose):
    few, all_of_it = (
        sizes(compose, "train.tasks=[gsm8k]", f"train.tasks_limit={limit}")[0] for limit in ("30", "9999")
    )
    assert (few.answers, few.problems, few.new_tokens) == (30, 30, 512)
    assert (all_of_it.problems, round(all_of_it.prompt_tokens), all_of_it.source) == (1_319, 64, "by facts")
    (hard,) = sizes(compose, "train.tasks=[math_hard]")
    assert (hard.problems, hard.source) == (50, "an estimate")


def test_problems_that_are_computed_or_in_files_are_counted(compose, write_jsonl):
    (computed,) = sizes(compose, "train.tasks=[logistic_map]", "train.tasks_limit=15")
    assert (computed.answers, computed.problems) == (15, 15)
    path = write_jsonl("test.jsonl", [{"question": "a" * 28, "answer": "#### 1"}] * 7)
    (read,) = sizes(compose, "train.tasks=[gsm8k]", f"train.task_settings={{gsm8k: {{files: ['{path}']}}}}")
    assert (read.problems, read.prompt_tokens) == (7, (28 + len("Question: \nAnswer:")) / 3.5)


def test_a_task_of_unknown_size_needs_a_limit(compose):
    (guessed,) = sizes(compose, "train.tasks=[math500]")
    assert (guessed.problems, guessed.prompt_tokens, guessed.source) == (50, 36, "a guess by the training rows")
    with pytest.raises(ValueError, match=r"train.tasks=\[math500\]: the number of its problems is unknown: set train"):
        sizes(compose, "train.tasks=[math500]", "train.task_settings={math500: {limit: null}}")


# --- how long it takes -----------------------------------------------------------------------------------------------


def test_the_time_of_answers_by_hand():
    h100 = GPUS["h100"]
    step = step_seconds(h100, layers=32, weight_bytes=16e9)
    assert step == 32 * LAYER_SECONDS + 16e9 / 3.35e12
    size = AnswerSize("math", 5_000, 5_000, 100, 924, "")  # 32 of 1,024 tokens at once
    assert size.seconds(1, step, 0) == 157 * 924 * step
    assert size.seconds(4, step, 0) == 40 * 924 * step
    assert size.seconds(1, 0, 1e-5) == pytest.approx(5_000 * 1e-5 * (100 + 924 / DECODING_SHARE))
    assert AnswerSize("long", 3, 3, 0, 50_000, "").seconds(1, 1, 0) == 3 * 50_000


@pytest.mark.parametrize(("rows", "measured"), [(1, 42), (4, 152), (16, 406), (64, 643)])
def test_smollm2_answers_as_fast_as_it_did_on_two_avx512_cores(rows, measured):
    """New tokens a second of docs/performance.md; products at 1.1 TFLOP/s and the share that training reaches."""
    step = step_seconds(Device("", 0, 1.1e12, CPU_BANDWIDTH), layers=30, weight_bytes=2 * 134_515_008)
    seconds = AnswerSize("", rows, rows, 0, 100, "").seconds(1, step, 2 * 134_515_008 / (0.45 * 1.1e12))
    assert rows * 100 / seconds == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_a_plan_prints_its_tasks_and_their_time(plan, capsys):
    own = plan(QUICK, "train.tasks=[gsm8k,logistic_map]", "train.tasks_limit=15")
    assert own.seconds - own.answer_seconds == pytest.approx(plan(QUICK).seconds)
    print_plan(own)
    out = capsys.readouterr().out
    assert "task       gsm8k: 15 problems of 64 tokens (by facts), up to 512 to answer, at 1 evaluation\n" in out
    assert "task       logistic_map: 15 problems of " in out
    assert "\n  answers, at most " in out
    print_plan(plan(QUICK))
    assert "answers" not in capsys.readouterr().out
