"""What cera-plan prints: plain aligned text where the output is no terminal."""

from __future__ import annotations

import pytest

from cera_train.planning.plan import make_plan
from cera_train.planning.table import print_plan, print_sweep_plans, print_table

MATH = "+recipe=math_r64"


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


def test_a_plan_prints_every_part(plan, capsys):
    print_plan(plan(MATH, "plan.price_per_hour=2"))
    out = capsys.readouterr().out
    assert out.startswith("plan       math_r64: cera r=64 on q_proj v_proj on meta-llama/Llama-3.1-8B, bfloat16\n")
    assert "171 tokens (an estimate), 100% supervised" in out
    assert "989 TFLOP/s at best, 40% of it in training (an assumption; set plan.mfu)" in out
    for label in ("parameters", "memory of one process", "work", "PFLOP", "time and cost"):
        assert f"\n{label}\n" in out
    rows = {line.rsplit("  ", 1)[0].strip(): line.split()[-1] for line in out.splitlines() if line.startswith("  ")}
    assert (rows["trainable"], rows["share"], rows["updates"]) == ("27,262,976", "0.34%", "4,689")
    assert {"embeddings", "attention q_proj", "MLP", "norms", "head", "adapter v_proj", "frozen"} <= rows.keys()
    assert {"weights", "activations", "logits", "peak in training", "activations with checkpointing"} <= rows.keys()
    assert {"forward", "backward", "evaluations", "in all", "an update", "GPU-hours", "cost"} <= rows.keys()
    assert "fits       cera r=64 on q_proj v_proj needs 31.40 GB of the 80 GB of H100\n" in out
    assert "set plan.price_per_hour" not in out


@pytest.mark.slow
def test_without_a_price_it_says_what_to_set(plan, capsys):
    print_plan(plan(MATH))
    assert "cost       set plan.price_per_hour to the price of one GPU\n" in capsys.readouterr().out
    print_plan(plan("+recipe=quickstart", "plan.gpu=cpu"))
    out = capsys.readouterr().out
    assert "plan.price_per_hour" not in out
    assert "GPU-hours" not in out
    assert "seen with SmolLM2-135M" in out


@pytest.mark.slow
def test_compared_adapters_stand_side_by_side(plan, capsys):
    own = plan("+recipe=quickstart", "plan.compare=[lora,dora]")
    adapters = [other.config.adapter for other in own.compared]
    assert [(adapter.kind, adapter.r) for adapter in adapters] == [("lora", 16), ("dora", 16)]
    assert own.compared[1].flops["forward"] > own.flops["forward"]
    print_plan(own)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["cera", "r=16", "lora", "r=16", "dora", "r=16"] for line in lines)
    line = next(line for line in lines if line.startswith("  trainable"))
    assert line.split() == ["trainable", "921,600", "921,600", "944,640"]
    assert sum(line.startswith("fits") for line in lines) == 3


@pytest.mark.slow
def test_a_plan_that_does_not_fit_prints_its_remedies(plan, capsys):
    large = [MATH, "plan.gpu=rtx4090", "train.micro_batch_tokens=8192"]
    small = plan(*large)
    assert not small.fits
    overrides = ["model.gradient_checkpointing=true", "model.quantization=nf4", "train.micro_batch_tokens=2048"]
    assert list(small.remedies) == [*overrides, "all of these"]
    for override in overrides:
        peak = plan(*large, override).memory.peak
        assert small.remedies[override].memory.peak == peak < small.memory.peak
    peaks = {override: other.memory.peak for override, other in small.remedies.items()}
    assert min(peaks.values()) == peaks["all of these"]
    assert plan("+recipe=math_r64_nf4", "plan.gpu=rtx4090").fits  # as the recipe's header says
    assert not plan(MATH).remedies
    print_plan(small)
    out = capsys.readouterr().out
    needs = f"too large  cera r=64 on q_proj v_proj needs {small.memory.peak / 1e9:.2f} GB"
    assert f"{needs}, more than 95% of the 24 GB of RTX 4090\n" in out
    for override, other in small.remedies.items():
        verdict = "fits" if other.memory.peak <= 0.95 * 24e9 else "still too large"
        assert f"           {other.memory.peak / 1e9:.2f} GB with {override}: {verdict}\n" in out
    assert "checkpointing=true: fits\n" in out
    assert "nf4: still too large\n" in out


@pytest.mark.slow
def test_a_sweep_adds_up_its_jobs(plan, capsys):
    quick = ["+recipe=quickstart", "plan.price_per_hour=2000"]
    jobs = [plan(*quick, f"adapter.r={r}", f"name=r{r}") for r in (4, 8, 16)]
    print_sweep_plans(jobs)
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["adapter.r=4", "230,400"], ["adapter.r=8", "460,800"], ["adapter.r=16", "921,600"]),
    ]
    assert total.split()[:2] == ["3", "jobs"]
    assert f"{sum(job.gpu_hours for job in jobs):,.2f}" in total
    assert total.split()[-1] == f"{sum(job.cost for job in jobs):,.2f}"
    assert total.split()[4] == "300"


def test_a_job_that_does_not_fit_is_marked(compose, capsys):
    models = ("llama3_2_1b", "llama3_1_8b")
    configs = [compose(MATH, f"model={name}", "plan.gpu=rtx4090", command="plan") for name in models]
    print_sweep_plans([make_plan(config, with_advice=False) for config in configs])
    _, small, large, _ = capsys.readouterr().out.splitlines()
    assert "does not fit" not in small
    assert large.endswith("does not fit RTX 4090")
    # Jobs on other models are told apart by their paths alone.
    assert small.startswith("model.path=meta-llama/Llama-3.2-1B  ")
    assert large.startswith("model.path=meta-llama/Llama-3.1-8B  ")


@pytest.mark.parametrize("columns", ["40"])
def test_a_narrow_terminal_setting_changes_no_pipe(plan, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    print_plan(plan(MATH))
    assert "  attention q_proj" in capsys.readouterr().out
