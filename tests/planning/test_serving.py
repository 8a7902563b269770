"""What adapters cost in vLLM, by plan."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from conftest import make_tiny_llama

from cera_train.planning.count import count_parameters
from cera_train.planning.devices import GPUS
from cera_train.planning.serving import devices_for, plan_serving, slot_bytes
from cera_train.planning.table import print_plan
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import ModelConfig


@pytest.fixture(scope="module")
def planned(plan):
    """Llama-3.1-8B with r = 20 on q and v."""
    return plan("+recipe=math_r64", "adapter.r=20")


def changed(planned, section: str, **settings):
    """The plan with another adapter or model in its config, which `plan_serving` looks at."""
    config = replace(planned.config, **{section: copy.copy(getattr(planned.config, section))})
    vars(getattr(config, section)).update(settings)
    return replace(planned, config=config, parameters=count_parameters(config.model, planned.config.adapter))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_slot_holds_a_lora_on_every_matrix(tmp_path, is_tied):
    model = make_tiny_llama(tie_word_embeddings=is_tied)
    model.config.save_pretrained(tmp_path)
    lora = AdapterConfig(kind="lora", r=16, target_modules="all-linear")
    counts = count_parameters(ModelConfig(path=str(tmp_path), dtype="float32"), lora)
    places = 2 * 16 * (512 + 32)  # embeddings and head
    assert slot_bytes(counts.sides, 16, 4, counts.sides) == 4 * (counts.trainable + places)
    packed = count_parameters(
        ModelConfig(path=str(tmp_path), dtype="float32"),
        AdapterConfig(kind="lora", r=16, target_modules=["q_proj", "k_proj", "v_proj"]),
    )
    assert slot_bytes(counts.sides, 16, 4, ["v_proj"]) == 4 * packed.trainable


def test_slots_are_those_that_vllm_allocates(plan):
    """vLLM 0.32.0 with SmolLM2-135M in bfloat16, max_lora_rank=16, two slots; and in float32 with target modules."""
    serving = plan_serving(plan("+recipe=quickstart", "model=smollm2_135m", "model.dtype=bfloat16"))
    assert 2 * serving.slot == 25_903_104
    assert 3 * serving.target_slot * 2 == 15_482_880


def test_the_parts_of_serving_by_hand(planned):
    serving, trainable = plan_serving(planned), planned.parameters.trainable
    assert (serving.rank, serving.targets) == (32, ["q_proj", "v_proj"])
    assert serving.base == serving.merged == 2 * 8_030_261_248
    assert serving.adapter == 2 * trainable == 2 * 20 * 32 * (2 * 4096 + 4096 + 1024)
    without_embeddings = 8_030_261_248 - 128_256 * 4096
    assert serving.work == pytest.approx(trainable / without_embeddings, rel=0.02)  # attention is the rest
    nf4 = plan_serving(changed(planned, "model", quantization="nf4"))
    assert nf4.base < nf4.merged == serving.merged


@pytest.mark.parametrize("settings", [{"kind": "dora"}, {"kind": "full", "r": None}, {"experts": True}, {"r": 1024}])
def test_what_vllm_does_not_serve_has_no_plan(planned, settings):
    assert plan_serving(changed(planned, "adapter", **settings)) is None


def test_a_learned_mix_is_served_with_a_gamma_for_each_projection(planned, plan):
    mixed, own = plan_serving(plan("+recipe=math_r64", "adapter=cera_mix", "adapter.r=20")), plan_serving(planned)
    assert mixed.adapter == own.adapter + 2 * 64  # 32 layers, q and v
    assert (mixed.rank, mixed.slot, mixed.targets) == (own.rank, own.slot, own.targets)


def test_models_share_a_device_as_far_as_they_fit():
    h100 = GPUS["h100"]
    assert [devices_for(count, 16e9, h100) for count in (1, 4, 5, 64)] == [1, 1, 2, 16]
    assert devices_for(1, 77e9, h100) == 0


def test_a_plan_prints_the_curve(planned, capsys):
    print_plan(planned)
    out = capsys.readouterr().out
    assert "serving    vLLM with --max-lora-rank 32; the branches add 0.11% to the base's FLOPs a token\n" in out
    (row,) = (line for line in out.splitlines() if line.startswith("64 "))
    assert " ".join(row.split()) == "64 11.82 GB 27.88 GB 18.48 GB 1.09 GB 1,027.87 GB 1 / 16"
    assert "--lora-target-modules q_proj v_proj;" in out
    print_plan(changed(planned, "adapter", kind="dora"))
    assert "\nserving " not in capsys.readouterr().out
