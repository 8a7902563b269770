"""y = W0 x + s B dropout(gate(A x)): a branch that is non-linear in x, so it is never merged into W0.

W0 is never read, only called: the same layer stands on nn.Linear, transformers' Conv1D and bitsandbytes' 4-bit and
8-bit linears. All adapters of a projection live in one layer, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .branch import GATES, Hidden, LearnedGate, PreparedBranch, add_branch, draw_seed, make_gate, start_branch
from .config import CeraConfig


class CeraLayer(nn.Module, BaseTunerLayer):
    """A frozen linear projection with CeRA branches beside it.

    Args:
        base_layer: the projection W0, [..., d_in] -> [..., d_out].
        adapter_name: the first adapter.
        config: its settings.

    Raises:
        TypeError: the base layer is not a linear projection.
    """

    adapter_layer_names = ("cera_A", "cera_B", "cera_gate")
    other_param_names = ("r", "scaling", "drops_input", "cera_dropout")

    cast_input_dtype_enabled = True
    """Whether x is cast to the adapter's dtype; `peft.helpers.disable_input_dtype_casting` sets it."""

    prepared: dict[str, PreparedBranch] | None = None
    """The branches of adapters by their names, inside `for_inference`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: CeraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self._make_containers(adapter_name)
        self.train(base_layer.training)  # a new module is in train mode, and would drop units of a model in eval mode
        self.update_layer(adapter_name, config)

    def _make_containers(self, adapter_name: str) -> None:
        """The parts of all adapters, by the adapter's name."""
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.drops_input: dict[str, bool] = {}
        self.cera_A = nn.ModuleDict()
        self.cera_B = nn.ModuleDict()
        self.cera_gate = nn.ModuleDict()
        self.cera_dropout = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: CeraConfig) -> None:
        """Adds an adapter, or replaces the one of that name."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.drops_input[adapter_name] = config.dropout_on == "input"
        dtype = self.base_dtype if self.base_dtype.itemsize >= 4 else torch.float32
        self.cera_A[adapter_name] = nn.Linear(self.in_features, config.r, bias=False, dtype=dtype)
        self.cera_B[adapter_name] = nn.Linear(config.r, self.out_features, bias=False, dtype=dtype)
        self.cera_gate[adapter_name] = make_gate(config, dtype)
        self.cera_dropout[adapter_name] = nn.Dropout(config.dropout).train(self.training)
        A, B, gate = (part[adapter_name] for part in (self.cera_A, self.cera_B, self.cera_gate))
        start_branch(A.weight, B.weight, gate, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def base_dtype(self) -> torch.dtype:
        """The base's dtype; float32 where a quantised weight has none."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Casts A and B to the base's 16 bits: PEFT's `autocast_adapter_dtype=False`."""
        for part in self._trained(adapter_name):
            part.to(self.base_dtype)

    def _trained(self, adapter_name: str) -> list[nn.Module]:
        """A, B and the gate of an adapter."""
        parts = (getattr(self, name) for name in self.adapter_layer_names)
        return [part[adapter_name] for part in parts if adapter_name in part]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves and never casts. PEFT calls this on loaded weights too; its version rounds them to a 16-bit base."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for part in self._trained(adapter_name):
            if not any(parameter.is_meta for parameter in part.parameters()):
                part.to(device)

    def _parts(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear, nn.Module, nn.Dropout, nn.Dropout]:
        """A, B, the gate, dropout of x, dropout of the hidden units."""
        A, B, gate = self.cera_A[adapter_name], self.cera_B[adapter_name], self.cera_gate[adapter_name]
        dropout = self.cera_dropout[adapter_name]
        dropouts = (dropout, NO_DROPOUT) if self.drops_input[adapter_name] else (NO_DROPOUT, dropout)
        return A, B, gate, *dropouts

    def branch(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """s B dropout(gate(A x)), which one adapter adds to the projection's output, [..., d_in] -> [..., d_out]."""
        A, B, gate, dropout_x, dropout = self._parts(adapter_name)
        if autocast_dtype(x.device) is None:
            # Adapter weights are fp32 over a 16-bit base. Autocast would bring x back to 16 bits at once.
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.scaling[adapter_name] * B(dropout(gate(A(dropout_x(x)))))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The projection with its active branches."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        result = output
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(output)
        is_ours = result is not output  # nothing else needs it, so it may be written into
        for adapter_name in self.active_adapters:
            branch = self.prepared.get(adapter_name) if self.prepared else None
            if branch is not None and branch.fits(result):
                result, is_ours = branch.add_to(result, x, is_ours), True
            elif adapter_name in self.cera_A:
                result, is_ours = self._add_branch(result, x, adapter_name, is_ours), True
        return result

    def _add_branch(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str, is_ours: bool) -> torch.Tensor:
        """result + branch(x), as one step where that rounds nowhere else and all weights may be read."""
        A, B, gate, dropout_x, dropout = self._parts(adapter_name)
        dtype = autocast_dtype(x.device) or A.weight.dtype
        may_read = is_plain(A, nn.Linear) and is_plain(B, nn.Linear)
        may_read &= is_plain(gate, LearnedGate) or type(gate) in GATES.values()
        if not (may_read and not is_transformed() and result.dtype == dtype and result.is_contiguous()):
            return (result + self.branch(x, adapter_name)).to(result.dtype)
        # Others may hold the output of a base layer with hooks, or need it in backward. A bias or 8-bit weights return
        # a view, which autograd does not let an in-place operation change.
        gives_away = is_plain(self.base_layer, nn.Linear, Conv1D)
        if not (is_ours or gives_away) or (torch.is_grad_enabled() and result._is_view()):
            result = result.clone()
        p_x, p = (part.p if part.training else 0.0 for part in (dropout_x, dropout))
        scaling, hidden = self.scaling[adapter_name], Hidden(gate, p, p_x, draw_seed(p or p_x))
        if self.prepared is not None and not (p or p_x):
            A_T, B_T = (part.weight.detach().to(dtype, copy=True).T for part in (A, B))
            self.prepared[adapter_name] = PreparedBranch(A_T, B_T, scaling, gate, gives_away)
        return add_branch(result, x.to(dtype), A.weight.to(dtype), B.weight.to(dtype), scaling, hidden)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the branch is not a matrix."""
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Does nothing: nothing is ever merged."""

    def __repr__(self) -> str:
        return "cera." + super().__repr__()


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """Lets the CeRA layers of a model in eval mode keep what their calls without gradient prepare.

        with torch.no_grad(), for_inference(model):
            model.generate(**inputs)

    Adapters may be switched inside. Their weights may not change, nor may what autocast casts to. The results are the
    same to the bit. Every active adapter takes its weights' memory once more in the precision that it computes in.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CeraLayer)]
    for layer in layers:
        layer.prepared = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.prepared = None


class CeraLinear(CeraLayer):
    """A `CeraLayer` under the name by which `all-linear` of a second adapter finds it: PEFT looks for "Linear"."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in; None where it is off, or where the device has none, as the meta device."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether it is of one of these classes, and a call of it does what its class does.

    FSDP1, ZeRO-3 and offloading fetch a weight at the call, and a hook may keep the output.
    """
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return type(module) in classes and not any(hooks) and not {"forward", "_hf_hook"} & vars(module).keys()


def is_transformed() -> bool:
    """Whether torch.compile or torch.func reads the operations: neither could read into `add_branch`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


NO_DROPOUT = nn.Dropout(0.0).eval()

MERGE_REFUSAL = (
    "CeRA cannot be merged: its branch is non-linear in x, so no weight matrix equals W0 plus the branch. "
    "Keep the adapter loaded beside the base model, or call unload() to get the base model back."
)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear projection.

    Raises:
        TypeError: the layer is of another kind (an embedding, a convolution, attention).
    """
    if isinstance(layer, Conv1D):  # stores W transposed: [d_in, d_out]
        return layer.weight.shape[0], layer.weight.shape[1]
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError("nn.MultiheadAttention reads this weight without calling its module: a branch would never run.")
    if isinstance(layer, nn.Linear):  # bitsandbytes' linears too
        return layer.in_features, layer.out_features
    raise TypeError(
        f"CeRA adapts linear projections (nn.Linear, Conv1D, bitsandbytes 4-bit and 8-bit), not {type(layer).__name__}."
    )
