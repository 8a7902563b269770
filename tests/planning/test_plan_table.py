"""What cera-plan prints: plain aligned text where the output is no terminal."""

from __future__ import annotations

import pytest

from cera_train.planning.table import print_plan, print_sweep_plans, print_table

MATH, QUICK = "+recipe=math_r64", "+recipe=quickstart"


def test_a_table_is_aligned_plain_text_of_any_width(capsys):
    rows = [["[q_proj]" + "x" * 200, "1.00 GB", ""], ["b", "20.00 GB", "does not fit"]]
    print_table(["job", "peak", ""], rows, right={1})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["job", "peak"],
        ["[q_proj]" + "x" * 200, "1.00", "GB"],
        ["b", "20.00", "GB", "does", "not", "fit"],
    ]
    assert lines[1].index("1.00 GB") == lines[2].index("20.00 GB") + 1
    assert not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])
def test_a_plan_prints_every_part(plan, capsys, monkeypatch, gpu):
    monkeypatch.setenv("COLUMNS", "40")
    own = plan(MATH, "plan.price_per_hour=2", f"plan.gpu={gpu}")
    print_plan(own)
    out = capsys.readouterr().out
    assert out.startswith("plan       math_r64: cera r=64 on q_proj v_proj on meta-llama/Llama-3.1-8B, bfloat16\n")
    assert "171 tokens (an estimate), 100% supervised" in out
    for label in ("parameters", "memory of one process", "work", "PFLOP", "time and cost"):
        assert f"\n{label}\n" in out
    rows = {line.rsplit("  ", 1)[0].strip(): line.split()[-1] for line in out.splitlines() if line.startswith("  ")}
    assert (rows["trainable"], rows["share"], rows["updates"]) == ("27,262,976", "0.34%", "4,689")
    assert {"embeddings", "attention q_proj", "MLP", "norms", "head", "adapter v_proj", "frozen"} <= rows.keys()
    assert {"weights", "optimizer", "gradients, activations", "peak in training", "peak in evaluation"} <= rows.keys()
    assert {"forward", "backward", "evaluations", "in all", "an update", "GPU-hours", "cost"} <= rows.keys()
    needs = f"cera r=64 on q_proj v_proj needs {own.peak / 1e9:.2f} GB"
    verdict = {
        "h100": f"fits       {needs} of the 80 GB of H100\n",
        "rtx4090": f"too large  {needs}, more than 95% of the 24 GB of RTX 4090\n",
    }
    assert verdict[gpu] in out
    assert "set plan.price_per_hour" not in out


def test_compared_adapters_stand_side_by_side_and_a_price_is_asked_for(plan, capsys):
    own = plan(QUICK, "plan.compare=[lora,dora]")
    print_plan(own)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert any(line.split() == ["cera", "r=16", "lora", "r=16", "dora", "r=16"] for line in lines)
    line = next(line for line in lines if line.startswith("  trainable"))
    assert line.split() == ["trainable", "921,600", "921,600", "944,640"]
    assert sum(line.startswith("fits") for line in lines) == 3
    assert "cost       set plan.price_per_hour to the price of one GPU\n" in out


@pytest.mark.slow
def test_a_sweep_adds_up_its_jobs(plan, capsys):
    jobs = [plan(QUICK, "plan.price_per_hour=2000", f"adapter.r={r}", f"name=r{r}") for r in (4, 8, 16)]
    print_sweep_plans(jobs)
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["adapter.r=4", "230,400"], ["adapter.r=8", "460,800"], ["adapter.r=16", "921,600"]),
    ]
    assert total.split()[:2] == ["3", "jobs"]
    assert f"{sum(job.gpu_hours for job in jobs):,.2f}" in total
    assert total.split()[-1] == f"{sum(job.cost for job in jobs):,.2f}"
    assert total.split()[4] == "300"


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_marked(plan, capsys):
    print_sweep_plans([plan(MATH, f"model={name}", "plan.gpu=rtx4090") for name in ("llama3_2_1b", "llama3_1_8b")])
    _, small, large, _ = capsys.readouterr().out.splitlines()
    assert "does not fit" not in small
    assert large.endswith("does not fit RTX 4090")
    # Jobs on other models are told apart by their paths alone.
    assert small.startswith("model.path=meta-llama/Llama-3.2-1B  ")
    assert large.startswith("model.path=meta-llama/Llama-3.1-8B  ")
