"""What N adapters on one base cost in vLLM, beside N merged models: bytes, and operations a token.

vLLM sets aside a slot for each of `--max-loras` adapters: A [R, in] and B [out, R] beside every matrix of the base,
R = `--max-lora-rank`, in the base's precision. The adapters lie in the CPU's memory too (`--max-cpu-loras`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from cera_train.common.imports import heavy_imports
from cera_train.planning.devices import USABLE, Device
from cera_train.planning.plan import RunPlan
from cera_train.settings.adapters import AdapterKind
from cera_train.settings.model import Dtype, Quantization

ADAPTERS = (1, 4, 16, 64)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""
PACKED = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
"""Projections that vLLM computes as one: a slot has a place for all or for none."""


@dataclass(frozen=True)
class Serving:
    rank: int
    """`--max-lora-rank`."""
    targets: list[str]
    """`--lora-target-modules`, which leaves the places of all others out."""
    base: float
    """Bytes of the base's weights."""
    merged: float
    """Bytes of a merged model."""
    slot: int
    """Bytes of a slot. A Llama's has places at the embeddings and the head; some other architectures' have none."""
    target_slot: int
    """Bytes of a slot with `--lora-target-modules`."""
    adapter: int
    """Bytes of an adapter in the CPU's memory."""
    work: float
    """Operations of the branches over those of the base, on the rows of the run."""


def plan_serving(plan: RunPlan) -> Serving | None:
    """What the adapter of a planned run costs to serve; None for one that vLLM does not serve."""
    adapter, model = plan.config.adapter, plan.config.model
    is_served = adapter.kind in (AdapterKind.cera, AdapterKind.lora, AdapterKind.rslora)
    rank = next((rank for rank in RANKS if rank >= adapter.r), None) if adapter.r else None
    if not is_served or adapter.adapted_experts or rank is None:
        return None
    with heavy_imports():
        from cera_train.planning.count import count_parameters
    counts, number = plan.parameters, 4 if model.dtype == Dtype.float32 else 2
    branches = 2 * counts.trainable
    return Serving(
        rank=rank,
        targets=list(counts.adapter),
        base=counts.weight_bytes,
        merged=count_parameters(replace(model, quantization=Quantization.none), adapter).weight_bytes,
        slot=slot_bytes(counts.sides, rank, number, counts.sides),
        target_slot=slot_bytes(counts.sides, rank, number, counts.adapter),
        adapter=number * counts.trainable,
        work=branches / (plan.token_flops - branches),
    )


def slot_bytes(sides: Mapping[str, int], rank: int, number: int, targets: Collection[str]) -> int:
    """Bytes of a slot with places at these projections, and at those that vLLM computes together with one of them.

    Args:
        sides: in + out of the matrices by name, see `Parameters`.
        number: bytes of a number.
    """
    places = set(targets).union(*(group for group in PACKED if group & set(targets)))
    return number * rank * sum(count for name, count in sides.items() if name in places)


def devices_for(models: int, size: float, device: Device) -> int:
    """How many devices so many models of this size fill, each model on one. 0: none of them fits."""
    each = int(USABLE * device.memory // size)
    return math.ceil(models / each) if each else 0
