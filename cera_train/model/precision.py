"""The precision of `model.dtype=auto`: bfloat16 if the hardware multiplies it; else float16 with
scaled gradients on a GPU, whose units multiply that, and float32 on a CPU.

The hardware's own report decides, never a stopwatch, so that one machine always computes the same.
"""

import os

import torch

from cera_train.common.settings import Choice
from cera_train.settings.model import Dtype

CPU_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
"""CPU features that multiply bf16, the fastest first."""

ONEDNN_ISAS_WITH_BF16 = (
    "ALL",
    "DEFAULT",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX10",
)
"""Values of ONEDNN_MAX_CPU_ISA, by their start, that leave oneDNN its bf16 products."""


def choose_precision(wanted: Dtype, device: torch.device) -> Choice[Dtype]:
    """The precision of the base weights on a device where `model.dtype` is `wanted`."""
    on_gpu = device.type == "cuda"
    bf16, hardware = _gpu_multiplies_bf16() if on_gpu else _cpu_multiplies_bf16()
    if wanted == Dtype.auto:
        narrow = Dtype.float16 if on_gpu else Dtype.float32
        return Choice(Dtype.bfloat16 if bf16 else narrow, hardware)
    is_slow = wanted == Dtype.bfloat16 and not bf16
    warning = "; slow: this hardware emulates it, 20 times as slow as float32" if is_slow else ""
    return Choice(wanted, f"model.dtype={wanted}{warning}")


def _gpu_multiplies_bf16() -> tuple[bool, str]:
    major, minor = torch.cuda.get_device_capability()
    verb = "multiplies bf16"
    if major < 8:
        verb = "does not multiply bf16; where float16 overflows, set model.dtype=float32"
    return major >= 8, f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) {verb}"


def _cpu_multiplies_bf16() -> tuple[bool, str]:
    capabilities = torch.cpu.get_capabilities()
    unit = next((name for key, name in CPU_UNITS.items() if capabilities.get(key)), None)
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if unit and not cap.startswith(ONEDNN_ISAS_WITH_BF16):
        return False, f"ONEDNN_MAX_CPU_ISA={cap} rules out {unit}"
    return (
        unit is not None,
        f"the processor has {unit}" if unit else "the processor does not multiply bf16",
    )
