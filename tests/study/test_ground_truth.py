"""The teachers of benchmarks/ground_truth.py write rows that are more likely under the teacher than under its base."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from benchmarks import ground_truth
from benchmarks.ground_truth import TEACHERS, Teacher, make_base, make_tokenizer, write


@pytest.mark.slow
def test_a_teacher_writes_what_its_branch_makes_likely(tmp_path, monkeypatch):
    monkeypatch.setattr(ground_truth, "WRITTEN", 300)
    make_base(tmp_path, updates=80)
    base, tokenizer = LlamaForCausalLM.from_pretrained(tmp_path / "base" / "adapter").eval(), make_tokenizer()
    affine = {}
    for name, form in TEACHERS.items():
        form = replace(form, gain=20)  # so early a base hardly listens to one projection
        teacher = Teacher(base, tokenizer, form)
        affine[name] = teacher.r2_of_affine
        rows = write(tmp_path / f"{name}.jsonl", teacher.writes())
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [tuple(json.loads(line).values()) for line in lines] == rows
        loss_of_base, hook = teacher.loss(rows), teacher.attach()
        assert teacher.loss(rows) < loss_of_base - 0.02
        hook.remove()
        assert teacher.loss(rows[:5]) == pytest.approx(Teacher(base, tokenizer, form).loss(rows[:5]))
    assert affine["even"] < 0.95  # its inputs are few letters yet
    assert affine["linear"] == pytest.approx(1)
