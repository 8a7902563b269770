"""model.dtype=auto: what the hardware reports decides."""

from __future__ import annotations

import pytest
import torch

from cera_train.model.precision import Precision, choose_precision
from cera_train.settings.model import Dtype, ModelConfig

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
    file = cpu(flags, lines)
    assert choose_precision(Dtype.auto, cuda=False, cpuinfo=file) == Precision(Dtype(dtype), reason)
    assert choose_precision(Dtype.auto, cuda=False, cpuinfo=file / "none").dtype == "float32"


def test_a_cap_on_onednn_counts_as_the_hardware_it_leaves(cpu, monkeypatch):
    file = cpu("avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    assert choose_precision(Dtype.auto, cuda=False, cpuinfo=file).dtype == "bfloat16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    capped = choose_precision(Dtype.auto, cuda=False, cpuinfo=file)
    assert (capped.dtype, "AVX2" in capped.reason) == ("float32", True)


def test_an_explicit_bfloat16_is_obeyed_and_known_to_be_slow(cpu):
    slow = choose_precision(Dtype.bfloat16, cuda=False, cpuinfo=cpu(""))
    assert slow.dtype == "bfloat16"
    assert "slow" in slow.reason
    assert "slow" not in choose_precision(Dtype.bfloat16, cuda=False, cpuinfo=cpu("avx512_bf16")).reason
    assert "slow" not in choose_precision(Dtype.float32, cuda=False, cpuinfo=cpu("")).reason


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_a_gpu_is_judged_by_its_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    chosen = choose_precision(Dtype.auto, cuda=True)
    assert chosen.dtype == dtype
    assert "some GPU" in chosen.reason


@pytest.mark.parametrize(
    ("dtype", "autocast", "on_gpu", "computed"),
    [
        ("float32", None, False, None),
        ("float32", True, False, "bfloat16"),
        ("bfloat16", None, False, "bfloat16"),
        ("bfloat16", False, True, None),
        ("float16", None, False, None),  # it needs a gradient scaler
        ("float16", None, True, "float16"),
    ],
)
def test_autocast_computes_in_the_bases_16_bits_where_the_device_can_train_in_them(dtype, autocast, on_gpu, computed):
    assert ModelConfig(path="base", dtype=Dtype(dtype)).autocast_dtype(autocast, on_gpu) == computed
