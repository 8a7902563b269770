"""Memory, work, time and cost of a run, and what `cera-plan` prints."""

import pytest
from commands import command
from conftest import needs_smollm2

from cera_train.common.files import read_json
from cera_train.evaluation.held_out import PROBE_TOKENS
from cera_train.planning.data_size import data_size, read_rows
from cera_train.planning.estimate import run_totals
from cera_train.planning.table import print_plans

MATH = "+recipe=math_r64"
QUICK = "+recipe=logistic_map"


@pytest.fixture
def size_and_totals(compose):
    """size_and_totals("data=gsm8k", ...) -> DataSize and the totals of a run on it."""

    def size_and_totals(*overrides: str):
        config = compose(*overrides, command="plan")
        size = data_size(config, read_rows(config))
        return size, run_totals(config, size)

    return size_and_totals


@pytest.fixture
def tiny_plan(plan, tiny_folder):
    """tiny_plan("adapter.r=8", ...) -> RunPlan of the logistic map with a two-layer Llama."""
    tiny = [QUICK, f"model.path={tiny_folder}", "data.max_length=256", "adapter.r=4"]
    return lambda *overrides: plan(*tiny, "train.batch_size=16", *overrides)


def test_the_activations_of_llama_by_hand(plan):
    """A token leaves in each layer: q, k, v, the output of attention and a float32 number a head; x
    and A x of two branches; gate and up; the input of two norms, and a float32 root mean square.
    And a chunk of logits, its float32 log-softmax, and 16 bits of its gradient."""
    memory = plan(MATH, "model=llama3_2_1b").memory
    weights = 6_815_744
    assert memory["weights"] == pytest.approx(2 * 1_235_814_400, rel=1e-6)  # and a buffer
    assert memory["adapter"] == 4 * weights
    assert memory["optimizer"] == pytest.approx(8 * weights, rel=0.001)
    attention = 2 * (2 * 2048 + 2 * 512) + 4 * 32
    layer = attention + 2 * (2048 + 2 * 64) + 2 * 2 * 8192 + 2 * (2 * 2048 + 4)
    expected = 16 * layer * 4096 + 10 * 128_256 * 1024 + 4 * weights
    assert memory["gradients, activations"] == pytest.approx(expected, rel=0.02)


def test_what_lowers_memory(tiny_plan):
    def activations(*overrides: str) -> float:
        planned = tiny_plan("train.micro_batch_tokens=1152", "adapter.r=1", *overrides)
        return planned.memory["gradients, activations"]

    whole = activations()
    assert activations("model.gradient_checkpointing=true") < whole
    assert activations("train.batch_size=32") == pytest.approx(whole, rel=0.05)
    assert activations("train.micro_batch_tokens=576") == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.slow
@needs_smollm2
def test_a_run_takes_what_was_predicted(plan, tmp_path, monkeypatch):
    """In a process of its own: the peak counts everything a process ever held."""
    settings = [QUICK, "train.max_updates=12", "train.eval_every=12"]
    # With all threads, as a user's: a test's one thread holds a tenth less.
    monkeypatch.delenv("OMP_NUM_THREADS")
    done = command("cera-train", *settings, "name=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "outputs" / "run" / "result.json")
    planned = plan(*settings, "plan.gpu=cpu")
    assert (planned.trainable, planned.totals.tokens) == (
        result["trainable_parameters"],
        result["tokens"],
    )
    # How far the C heap grows differs by up to 13 % between equal float32 runs of 12 updates.
    assert planned.peak == pytest.approx(result["peak_memory_bytes"], rel=0.13)


def test_processes_share_rows_and_weights(tiny_plan):
    one, two = (tiny_plan(f"plan.gpus={gpus}") for gpus in (1, 2))
    assert two.memory["buckets"] == two.memory["adapter"] == one.memory["adapter"]
    assert two.memory["gradients, activations"] < one.memory["gradients, activations"]
    sharded = tiny_plan("plan.gpus=2", "distributed.strategy=fsdp").memory
    assert sharded["weights"] == one.memory["weights"] / 2
    assert sharded["gathered"] == pytest.approx(one.memory["weights"], rel=0.1)  # it has two layers
    assert "buckets" not in sharded


def test_time_and_cost_follow_from_the_operations(tiny_plan):
    run = ["plan.gpu=a100", "plan.price_per_hour=2"]
    one = tiny_plan(*run)
    eight = tiny_plan(*run, "plan.gpus=8")
    operations = sum(one.flops.values())
    assert one.seconds == pytest.approx(operations / (312e12 * 0.4))
    assert one.cost == pytest.approx(one.seconds / 3600 * 2)
    assert one.update_seconds * one.totals.updates == pytest.approx(
        one.seconds * one.flops["training"] / operations
    )
    assert eight.seconds == pytest.approx(one.seconds / 8, rel=0.05)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours, rel=0.05)
    assert tiny_plan().cost is None
    with_task = tiny_plan(*run, "train.tasks=[gsm8k]")
    assert with_task.seconds == one.seconds  # generating its answers is not counted


def test_totals_follow_from_epochs_or_updates(size_and_totals):
    updates = ["train.max_updates=20", "train.eval_every=10"]
    quick = size_and_totals(QUICK, "plan.tokens_per_row=72", *updates)[1]
    assert (quick.updates, quick.tokens, quick.evaluations) == (20, 158 * 72, 3)
    # Training, and a probe before, after and between.
    assert quick.forward_tokens == 3 * 20 * 72 + 4 * 20 * 72
    epochs = ["train.epochs=2", "train.eval_every=null"]
    gsm8k = size_and_totals("+recipe=gsm8k_r64", *epochs)[1]
    assert (gsm8k.updates, gsm8k.tokens, gsm8k.evaluations) == (2 * 117, 2 * 7473 * 187, 2)


def test_objectives_add_their_passes_and_answers(size_and_totals):
    updates = ["train.max_updates=10", "train.batch_size=16"]
    data, plain = size_and_totals(*updates, "data=gsm8k")
    words = [*updates, "data=gsm8k", "train.objective=grpo"]
    words += ["grpo.answers=4", "grpo.max_new_tokens=100"]
    grpo = size_and_totals(*words)[1]
    sequence = data.tokens_per_row * (1 - data.supervised) + 100
    assert (grpo.tokens, grpo.forward_tokens) == (
        pytest.approx(10 * 16 * 4 * sequence),
        plain.forward_tokens,
    )
    served = size_and_totals(*words, "train.server=http://localhost:8000")[1]
    # the check of the server's log p
    assert served.forward_tokens - plain.forward_tokens == pytest.approx(served.tokens)
    data, dpo = size_and_totals(*updates, "data=preferences", "train.objective=dpo")
    pair = 2 * data.tokens_per_row
    probes = 3 * PROBE_TOKENS
    assert dpo.tokens == 10 * 16 * pair
    reference = (data.train_rows + data.eval_rows) * pair
    assert dpo.forward_tokens == 2 * data.eval_rows * pair + probes + dpo.tokens + reference


def test_an_update_takes_no_more_rows_than_there_are(tiny_plan):
    few, fewer = (
        tiny_plan("data.train_rows=8", f"train.batch_size={rows}").memory for rows in (64, 8)
    )
    assert few == fewer


@pytest.mark.slow
def test_a_sweep_adds_up_its_jobs_and_marks_what_does_not_fit(plan, capsys):
    words = [MATH, "plan.gpu=rtx4090", "plan.price_per_hour=2"]
    models = ("model=llama3_2_1b", "model=llama3_1_8b")
    plans = [plan(*words, model) for model in models]
    print_plans("job", {model: [planned] for model, planned in zip(models, plans, strict=True)})
    *_, small, large, total = (line for line in capsys.readouterr().out.splitlines() if line)
    assert "does not fit" not in small
    assert large.endswith("does not fit RTX 4090")
    assert total.split()[:2] == ["2", "jobs"]
    assert f"{sum(job.gpu_hours for job in plans):,.2f}" in total
    assert total.split()[-1] == f"{sum(job.cost for job in plans):,.2f}"


def test_a_plan_needs_no_tracker_and_no_adapter_that_another_run_will_leave(
    run_command, tiny_folder, capfd
):
    words = [QUICK, f"model.path={tiny_folder}", "data.max_length=256"]
    words += ["adapter.start_from=outputs/first", "tracker.kinds={swanlab: null}"]
    assert run_command("cera-plan", *words, "adapter.r=4") == 0
    assert run_command("cera-plan", "-m", *words, "adapter.r=4") == 0
    assert f"\n{QUICK},adapter.r=4," in capfd.readouterr().out  # the job's name
