"""Memory, work, time and cost of a run; adapters side by side; what lowers the peak."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES

from cera_train.planning import plan as plan_module
from cera_train.planning.devices import GPU_MFU, GPUS
from cera_train.planning.plan import CUDA_BUILD_BYTES, HEAP_SHARE, PROCESS_BYTES, micro_batches, run_totals

MATH = "+recipe=math_r64"
QUICK = "+recipe=quickstart"
LINEARS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_parts_of_memory_by_hand(plan):
    memory = plan(MATH).memory
    assert memory.training["weights"] == 2 * 8_030_261_248
    assert memory.training["adapter"] == memory.training["gradients"] == 4 * 27_262_976
    assert memory.training["optimizer"] == 8 * 27_262_976
    assert memory.training["logits"] == 10 * 128_256 * 1024
    assert memory.evaluation["logits"] == 8 * 128_256 * 1024
    assert memory.peak == sum(memory.training.values()) > sum(memory.evaluation.values())
    assert plan(QUICK, "plan.gpus=2").memory.training["gradients"] == 8 * 921_600


def test_the_activations_of_llama_by_hand(plan):
    """A token leaves in each layer: q, k, v, the output of attention and a float32 number a head; x and A x of two
    branches; gate and up; the input of two norms, and a float32 root mean square."""
    saved = plan(MATH).memory.training["activations"]
    attention = 2 * (2 * 4096 + 2 * 1024) + 4 * 32
    layer = attention + 2 * (4096 + 2 * 64) + 2 * 2 * 14336 + 2 * (2 * 4096 + 4)
    assert saved == pytest.approx(32 * layer * 4096, rel=0.02)


@pytest.mark.slow
def test_quantised_weights_and_moments(plan):
    rest = 2 * (8_030_261_248 - LINEARS)
    nf4 = plan("+recipe=math_r64_nf4").memory.training
    assert nf4["weights"] == pytest.approx(LINEARS * 4.127 / 8 + rest, rel=1e-4)
    assert nf4["optimizer"] == pytest.approx(2 * 27_262_976, rel=0.02)
    int8 = plan(MATH, "model.quantization=int8").memory.training
    assert int8["weights"] == pytest.approx(LINEARS + rest, rel=1e-3)


@pytest.mark.slow
def test_checkpointing_and_smaller_micro_batches_lower_the_activations(plan):
    whole = plan(QUICK)
    checkpointed = plan(QUICK, "model.gradient_checkpointing=true")
    assert checkpointed.memory.training["activations"] < whole.memory.training["activations"] / 5
    assert whole.other_activations == checkpointed.memory.training["activations"]
    assert checkpointed.other_activations == whole.memory.training["activations"]
    assert checkpointed.flops["backward"] > whole.flops["backward"] * 1.5
    double = plan(QUICK, "train.batch_size=16").memory.training["activations"]
    assert double == pytest.approx(whole.memory.training["activations"] * 2, rel=0.05)
    cut = plan(QUICK, "train.batch_size=16", "train.micro_batch_tokens=576").memory.training["activations"]
    assert cut == whole.memory.training["activations"]


@pytest.mark.slow
def test_a_cpu_holds_libraries_and_gaps_and_chunks_of_its_size(plan, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    own = plan("+recipe=quickstart", "plan.gpu=cpu", "model.dtype=bfloat16")
    assert own.device.flops > 1e8
    training, evaluation = own.memory.training, own.memory.evaluation
    assert training["libraries"] == evaluation["libraries"] == PROCESS_BYTES
    monkeypatch.setattr("torch.version.cuda", "13.0")
    built_for_cuda = plan("+recipe=quickstart", "plan.gpu=cpu", "model.dtype=bfloat16")
    assert built_for_cuda.memory.peak == own.memory.peak + CUDA_BUILD_BYTES
    assert training["heap's gaps"] == HEAP_SHARE * training["activations"]
    assert evaluation["activations"] == training["activations"]  # the heap has not given it back
    assert training["logits"] == 10 * 49_152 * 128
    wide = plan("+recipe=quickstart", "plan.gpu=cpu", "model.dtype=float32")
    assert wide.memory.training["logits"] == 8 * 49_152 * 128
    head = ["model=llama3_1_8b", "adapter.target_modules=[q_proj,lm_head]"]  # SmolLM2's head is the embeddings'
    trained = plan("+recipe=quickstart", "plan.gpu=cpu", *head).memory.training
    assert trained["logits"] == 12 * 128_256 * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "measured"),
    [
        (["adapter=cera", "model.dtype=bfloat16"], 1_252_950_016),
        (["adapter=cera", "model.dtype=float32"], 1_748_140_032),
        (["adapter=lora", "model.dtype=bfloat16"], 1_429_544_960),
        (["adapter=lora", "model.dtype=float32"], 1_955_229_696),
    ],
    ids=str,
)
def test_the_quickstart_needs_what_it_needed_on_two_avx512_cores(plan, variant, measured, monkeypatch):
    """Resident memory of a separate process with a torch for CPUs, by result.json. The heap's gaps differ: on another
    day the same code took 13 to 18 % more."""
    monkeypatch.setattr("torch.version.cuda", None)
    predicted = plan("+recipe=quickstart", "plan.gpu=cpu", *variant).memory.peak
    assert predicted == pytest.approx(measured, rel=0.1)


# --- micro-batches, work, time, cost ---------------------------------------------------------------------------------


def test_updates_and_tokens_of_the_quickstart_are_those_it_has(plan):
    totals = plan("+recipe=quickstart", "train.max_updates=20", "train.eval_every=10").totals
    assert (totals.updates, totals.rows, totals.tokens, totals.evaluations) == (20, 158, 11_376, 3)
    assert totals.eval_tokens == 3 * 20 * 72 + 4 * 20 * 72  # and a probe before, after and between
    assert plan(MATH).totals.updates == 4_689


def batches(compose, *overrides: str, by_sequence: bool = True):
    from cera_train.planning.data_size import data_size

    config = compose(MATH, *overrides, command="plan")
    return micro_batches(config, data_size(config.data), by_sequence)


def test_a_micro_batch_is_cut_as_in_training(compose):
    largest, usual = batches(compose, "model.dtype=bfloat16")
    assert largest == usual
    assert (largest.rows, largest.length, largest.is_flat, largest.has_mask) == (24, 171, True, False)
    assert (largest.autocast, largest.on_gpu) == ("bfloat16", True)
    eighth, _ = batches(compose, "model.dtype=bfloat16", "plan.gpus=8")  # 8 rows: longer in one of many
    assert 8 * 171 < eighth.tokens < 8 * 171 * 1.5
    assert batches(compose, "model.dtype=float32")[0].autocast is None
    assert batches(compose, "model.dtype=float32", "train.autocast=true")[0].autocast == "bfloat16"
    assert batches(compose, "model.dtype=float16")[0].autocast == "float16"
    assert batches(compose, "model.dtype=float16", "plan.gpu=cpu")[0].autocast is None


def test_a_mask_stands_where_attention_cannot_run_by_sequence(compose):
    largest, usual = batches(compose, by_sequence=False)
    assert largest.has_mask
    assert largest.is_flat  # a GPU
    largest, usual = batches(compose, "plan.gpu=cpu", by_sequence=False)
    assert largest.has_mask
    assert not largest.is_flat
    assert (largest.length, usual.length) == (512, 171)  # the longest rows need the most memory
    for flash in ("flash_attention_2", "kernels-community/flash-attn"):
        own = [f"model.attn_implementation={flash}", "model.trust_remote_code=true"]
        assert not batches(compose, *own, by_sequence=False)[0].has_mask
    assert not batches(compose, "train.batch_layout=padded", "data=logistic_map")[0].has_mask
    assert batches(compose, "train.batch_layout=padded")[0].has_mask


@pytest.mark.slow
def test_masked_attention_costs_the_whole_row(plan):
    """SmolLM2 on the logistic map: 30 layers of 9 heads of 64; 8 rows of 72 tokens in an update."""
    flat = plan("+recipe=quickstart", "model.attn_implementation=eager", "train.batch_layout=flat")
    padded = plan("+recipe=quickstart", "model.attn_implementation=eager", "train.batch_layout=padded")
    more = flat.flops["forward"] - padded.flops["forward"]
    assert more == pytest.approx(30 * 4 * 9 * 64 * (8 * 72 - 72) * flat.totals.tokens, rel=0.01)
    assert flat.flops["evaluations"] > padded.flops["evaluations"]
    assert flat.memory.training["activations"] > padded.memory.training["activations"]


def test_time_and_cost_follow_from_the_operations(plan):
    run = [QUICK, "plan.gpu=a100", "plan.price_per_hour=2"]
    one = plan(*run)
    assert one.seconds == pytest.approx(sum(one.flops.values()) / (312e12 * GPU_MFU))
    assert one.cost == pytest.approx(one.seconds / 3600 * 2)
    assert one.update_seconds * one.totals.updates == pytest.approx(
        one.seconds * (1 - one.flops["evaluations"] / sum(one.flops.values()))
    )
    eight = plan(*run, "plan.gpus=8", "plan.mfu=0.2")
    assert eight.seconds == pytest.approx(one.seconds / 4, rel=0.01)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours * 2, rel=0.01)
    assert plan(QUICK).cost is None


def test_totals_follow_from_epochs_or_updates(compose):
    from cera_train.planning.data_size import data_size

    config = compose("+recipe=gsm8k_r64", "train.epochs=2", "train.eval_every=null")
    totals = run_totals(config, data_size(config.data))
    assert (totals.updates, totals.rows, totals.evaluations) == (2 * 117, 2 * 7473, 2)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_plans(plan, gpu):
    assert plan("+recipe=math_r64_nf4", f"plan.gpu={gpu}").device is GPUS[gpu]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_there_is_one_cpu(plan):
    with pytest.raises(ValueError, match="plan.gpus=2 with plan.gpu=cpu: there is one CPU"):
        plan("plan.gpu=cpu", "plan.gpus=2")


def test_rows_beyond_the_positions_are_refused_as_in_training(plan):
    with pytest.raises(ValueError, match="data.max_length=9000 is beyond the 8192 positions"):
        plan("data.max_length=9000", "train.micro_batch_tokens=9000")


@pytest.mark.parametrize("override", ["plan.mfu=1.5", "plan.mfu=0", "plan.gpus=0", "plan.price_per_hour=-1"])
def test_settings_that_make_no_sense_are_refused(compose, override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        compose(override, command="plan")


# --- the same run, changed -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_at_the_same_budget(plan):
    own = plan(QUICK, "plan.compare=[dora,lora]", "plan.compare_at=budget", "adapter.target_modules=[up_proj]")
    dora, lora = own.compared
    assert (dora.config.adapter.r, lora.config.adapter.r) == (15, 16)
    assert abs(dora.parameters.trainable - own.parameters.trainable) <= 30 * (576 + 1536) / 2


@pytest.mark.slow
def test_a_gate_stays_with_cera(plan):
    own = plan("adapter.activation=relu", "plan.compare=[lora,cera]")
    assert [other.config.adapter.activation for other in own.compared] == ["silu", "relu"]


def test_a_remedy_that_changes_nothing_is_not_offered(compose, monkeypatch):
    from cera_train.planning import plan as module

    monkeypatch.setattr(module, "plan_alone", lambda config: config)
    shrunk = [MATH, "model.gradient_checkpointing=true", "train.micro_batch_tokens=512"]
    assert list(module._remedies(compose(*shrunk, command="plan"))) == ["model.quantization=nf4"]
    assert not module._remedies(compose(*shrunk, "model.dtype=float16", command="plan"))


@pytest.mark.parametrize(("name", "is_flat"), [("llama", True), ("bamba", False)])
def test_rows_of_a_model_with_a_state_are_padded(plan, tmp_path, monkeypatch, name, is_flat):
    ARCHITECTURES[name].config().save_pretrained(tmp_path)
    planned = []
    monkeypatch.setattr(plan_module, "micro_batches", lambda *args: planned.append(micro_batches(*args)) or planned[-1])
    small = ["adapter.r=4", "train.micro_batch_tokens=64", "data.max_length=32", "plan.gpu=h100"]
    plan(QUICK, f"model.path={tmp_path}", *small)
    assert [batch.is_flat for batch in planned[0]] == [is_flat, is_flat]
