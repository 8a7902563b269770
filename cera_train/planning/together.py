"""How many runs train on one base at once in a given memory."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from cera_train.common.errors import UserError
from cera_train.planning.devices import USABLE
from cera_train.planning.plan import memory_of_arm
from cera_train.settings.planning import GpuKind, PlanConfig
from cera_train.settings.run import Config, PlanRun


def arms_that_fit(configs: Sequence[Config]) -> int:
    """How many of these runs, from the first on, can train on one base in the memory that is free here; at least 1. One
    that cannot be planned will fail by itself, and counts as nothing.

    Raises:
        UserError: none of them can be planned.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    memory = USABLE * (torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available)
    plan = PlanConfig(gpu=GpuKind.h100 if on_gpu else GpuKind.cpu)  # bytes are alike on all GPUs
    shared = adapters = 0.0
    for count, config in enumerate(configs):
        try:
            base, adapter = memory_of_arm(PlanRun(**vars(config), plan=plan))
        except UserError as error:
            reason = error
            continue
        shared, adapters = max(shared, base), adapters + adapter
        if shared + adapters > memory:
            return max(1, count)
    if not shared:
        raise UserError(f"launch.together=auto cannot be planned: {reason} Or set launch.together=8.") from reason
    return len(configs)
