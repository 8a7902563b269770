"""model.dtype=auto: what the hardware reports decides."""

from __future__ import annotations

import pytest
import torch

from cera_train.model.precision import choose_precision
from cera_train.model.weights import quantization_config
from cera_train.settings.model import Dtype, ModelConfig, Quantization

X86 = "processor : 0\nflags\t\t: fpu sse2 avx avx2 fma {}\nmodel name : some CPU\n"
ARM = "processor : 0\nFeatures\t: fp asimd {}\n"


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """cpu("avx512_bf16") -> the file in which Linux reports such a processor."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    def cpu(flags: str, lines: str = X86):
        (tmp_path / "cpuinfo").write_text(lines.format(flags))
        return tmp_path / "cpuinfo"

    return cpu


@pytest.mark.parametrize(
    ("flags", "lines", "dtype", "reason"),
    [
        ("", X86, "float32", "the processor does not multiply bf16"),
        ("avx512f avx512_bf16", X86, "bfloat16", "the processor has AVX512-BF16"),
        ("avx512_bf16 amx_bf16 amx_tile", X86, "bfloat16", "the processor has AMX"),
        ("i8mm bf16", ARM, "bfloat16", "the processor has Arm BF16"),
    ],
)
def test_auto_follows_the_processors_flags(cpu, flags, lines, dtype, reason):
    chosen = choose_precision(Dtype.auto, cuda=False, cpuinfo=cpu(flags, lines))
    assert (chosen.dtype, chosen.reason, chosen.is_slow) == (dtype, reason, False)


def test_a_machine_without_that_report_computes_in_float32(tmp_path):
    assert choose_precision(Dtype.auto, cuda=False, cpuinfo=tmp_path / "none").dtype == "float32"


@pytest.mark.parametrize(
    ("cap", "dtype"),
    [("AVX2", "float32"), ("AVX512_CORE", "float32"), ("avx512_core_bf16", "bfloat16"), ("ALL", "bfloat16")],
)
def test_a_cap_on_onednn_counts_as_the_hardware_it_leaves(cpu, monkeypatch, cap, dtype):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    chosen = choose_precision(Dtype.auto, cuda=False, cpuinfo=cpu("avx512_bf16"))
    assert chosen.dtype == dtype
    assert (cap in chosen.reason) == (dtype == "float32")


def test_an_explicit_bfloat16_is_obeyed_and_known_to_be_slow(cpu):
    slow = choose_precision(Dtype.bfloat16, cuda=False, cpuinfo=cpu(""))
    assert (slow.dtype, slow.is_slow) == ("bfloat16", True)
    assert not choose_precision(Dtype.bfloat16, cuda=False, cpuinfo=cpu("avx512_bf16")).is_slow
    assert not choose_precision(Dtype.float32, cuda=False, cpuinfo=cpu("")).is_slow


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_is_judged_by_its_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    chosen = choose_precision(Dtype.auto, cuda=True)
    assert chosen.dtype == dtype
    assert "some GPU" in chosen.reason


def test_nf4_computes_in_the_precision_of_the_base():
    for dtype in (torch.float32, torch.bfloat16):
        assert quantization_config(Quantization.nf4, dtype).bnb_4bit_compute_dtype == dtype
    with pytest.raises(ValueError, match="nf4 does not compute in float16"):
        ModelConfig(path="x", dtype=Dtype.float16, quantization=Quantization.nf4)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("autocast", [None, False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_computes_in_the_bases_16_bits_where_the_device_can_train_in_them(dtype, autocast, on_gpu):
    """By default over 16 bits alone; over float32, where it is wanted, in bfloat16."""
    computed = ModelConfig(path="base", dtype=Dtype(dtype)).autocast_dtype(autocast, on_gpu)
    is_on = autocast is not False and not (dtype == "float32" and autocast is None)
    is_on = is_on and not (dtype == "float16" and not on_gpu)
    assert computed == (({"float32": "bfloat16"}.get(dtype, dtype)) if is_on else None)
