"""The benchmarks of `make evidence`: on inputs of known distribution the controls of
one_projection.py come out right, and the teachers of ground_truth.py write rows that are more
likely under the teacher than under its base."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import ground_truth, one_projection
from benchmarks.ground_truth import Teacher, make_base, make_others, make_tokenizer, write
from benchmarks.one_projection import STUDENTS, TEACHERS, Data, teach, train


@pytest.fixture
def data_of(monkeypatch):
    """data_of(teacher) -> 3,000 normal inputs of width 16 with a mean, and its targets."""
    monkeypatch.setattr(one_projection, "HELD_OUT", 1_000)
    monkeypatch.setattr(one_projection, "STEPS", 600)
    monkeypatch.setattr(one_projection, "BATCH", 256)
    x = torch.randn(3_000, 16, generator=torch.Generator().manual_seed(0)) + 1
    return lambda teacher: Data.of(x, teach(x, *TEACHERS[teacher]))


def test_a_gate_wins_on_the_even_teacher_and_not_on_the_linear_one(data_of):
    even = data_of("even, 3 A")
    linear = data_of("linear")
    assert even.r2(even.best_affine()) < 0.1
    assert train(STUDENTS["CeRA, 3 A"], 64, 1e-2, even) > 0.3
    assert train(STUDENTS["identity, half scale"], 64, 1e-2, even) < 0.1
    best = linear.r2(linear.best_of_rank(linear.best_affine(), 16))
    for student in ("identity, half scale", "CeRA, 3 A"):
        assert 0.9 < train(STUDENTS[student], 16, 1e-2, linear) < best


def test_the_closed_form_of_lora_is_the_best_of_its_rank(data_of):
    data = data_of("linear")
    affine = data.best_affine()
    by_rank = [data.r2(data.best_of_rank(affine, r)) for r in (1, 4, 8)]
    assert by_rank == sorted(by_rank)
    assert by_rank[2] == pytest.approx(1, abs=1e-6)  # the teacher has eight units
    assert by_rank[1] >= train(STUDENTS["identity, half scale"], 4, 1e-2, data) > by_rank[1] - 0.05


@pytest.mark.slow
def test_a_teacher_writes_what_its_branch_makes_likely(tmp_path, monkeypatch):
    monkeypatch.setattr(ground_truth, "WRITTEN", 300)
    usual = make_base(tmp_path, updates=80)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base" / "adapter").eval()
    tokenizer = make_tokenizer()
    affine = {}
    for name, form in ground_truth.TEACHERS.items():
        form = replace(form, gain=20)  # so early a base hardly listens to one projection
        teacher = Teacher(base, tokenizer, form)
        affine[name] = teacher.r2_of_affine
        rows = write(tmp_path / f"{name}.jsonl", teacher.writes())
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [tuple(json.loads(line).values()) for line in lines] == rows
        loss_of_base = teacher.loss(rows)
        hook = teacher.attach()
        assert teacher.loss(rows) < loss_of_base - 0.02
        hook.remove()
        assert teacher.loss(rows[:5]) == pytest.approx(
            Teacher(base, tokenizer, form).loss(rows[:5])
        )
    assert affine["even"] < 0.95  # its inputs are few letters yet
    assert affine["linear"] == pytest.approx(1)

    monkeypatch.setattr(ground_truth, "TAUGHT", 20)
    make_others(tmp_path, 30, usual)
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert all(row["completion"] == row["prompt"][-2::-1] for row in asked if row["prompt"] >= "m")
    assert all(f"{row['completion']}:" == row["prompt"] for row in asked if row["prompt"] < "m")
    assert all(
        (tmp_path / name / "adapter" / "config.json").exists() for name in ("speller", "marked")
    )
