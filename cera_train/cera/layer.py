"""y = W0 x + s B dropout(gate(A x)): a branch that is non-linear in x, so it is never merged into
W0.

W0 is never read, only called: the same layer stands on nn.Linear, transformers' Conv1D and
bitsandbytes' 4-bit and 8-bit linears. All adapters of a projection live in one layer, by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .branch import GATES, Hidden, LearnedGate, add_branch, start_branch
from .config import CeraConfig


class CeraLayer(nn.Module, BaseTunerLayer):
    """CeRA branches beside a frozen base, by the names of their adapters."""

    adapter_layer_names = ("cera_A", "cera_B", "cera_gate")
    other_param_names = ("cera_dropout_x", "cera_dropout", "r", "scaling")

    cast_input_dtype_enabled = True
    """Whether x is cast to the adapter's dtype; `peft.helpers.disable_input_dtype_casting` sets
    it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.cera_A = nn.ModuleDict()
        self.cera_B = nn.ModuleDict()
        self.cera_gate = nn.ModuleDict()
        self.cera_dropout_x = nn.ModuleDict()
        self.cera_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._active_adapter = adapter_name
        self.train(
            base_layer.training
        )  # a new module is in train mode, and would drop units of a model in eval mode
        self.update_layer(adapter_name, config)

    def _make_parts(self, A: nn.Module, B: nn.Module, config: CeraConfig) -> dict[str, Any]:
        """A fresh branch, by the names of the containers."""
        gate = GATES[config.activation]()
        gate = LearnedGate(gate, A.weight.dtype) if config.mix == "learned" else gate
        start_branch(A.weight, B.weight, gate, config)
        drops = [
            config.dropout if config.dropout_on == place else 0.0 for place in ("input", "hidden")
        ]
        dropout_x, dropout = (nn.Dropout(p).train(self.training) for p in drops)
        modules = {
            "cera_A": A,
            "cera_B": B,
            "cera_gate": gate,
            "cera_dropout_x": dropout_x,
            "cera_dropout": dropout,
        }
        return modules | {"r": config.r, "scaling": config.scaling}

    @property
    def base_dtype(self) -> torch.dtype:
        """The base's dtype; float32 where a quantised weight has none."""
        _, dtype = super()._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else torch.float32

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The base's, but at least 32 bits."""
        return self.base_dtype if self.base_dtype.itemsize >= 4 else torch.float32

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, None]:
        """The device alone: with a dtype, PEFT would round loaded weights to a 16-bit base."""
        return super()._get_base_layer_device_and_dtype(base_layer)[0], None

    def parts(self, adapter_name: str) -> list[nn.Module]:
        """A, B, the gate, dropout of x, dropout of the hidden units."""
        parts = self.cera_A, self.cera_B, self.cera_gate, self.cera_dropout_x, self.cera_dropout
        return [part[adapter_name] for part in parts]


class CeraLinear(CeraLayer):
    """A frozen linear projection with CeRA branches beside it.

    Args:
        base_layer: the projection W0, [..., d_in] -> [..., d_out].
        adapter_name: the first adapter.
        config: its settings.

    Raises:
        TypeError: the base layer is not a linear projection.
    """

    kept: dict[tuple[str, torch.dtype], tuple] | None = None
    """Arguments of `add_branch`, and whether it may write into the base's output, by adapter and
    the output's dtype: inside `for_inference`."""

    def update_layer(self, adapter_name: str, config: CeraConfig) -> None:
        """Adds an adapter, or replaces the one of that name."""
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        A = nn.Linear(self.in_features, config.r, bias=False, dtype=self.adapter_dtype)
        B = nn.Linear(config.r, self.out_features, bias=False, dtype=self.adapter_dtype)
        for name, part in self._make_parts(A, B, config).items():
            getattr(self, name)[adapter_name] = part
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The projection with its active branches."""
        result = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for adapter_name in self.active_adapters:
                if adapter_name in self.cera_A:
                    result = self._add_branch(result, x, adapter_name)
        return result

    def branch(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """s B dropout(gate(A x)), which one adapter adds to the projection's output, [..., d_in] ->
        [..., d_out]."""
        A, B, gate, dropout_x, dropout = self.parts(adapter_name)
        if autocast_dtype(x.device) is None:
            # Adapter weights are fp32 over a 16-bit base. Autocast would bring x back to 16 bits at
            # once.
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.scaling[adapter_name] * B(dropout(gate(A(dropout_x(x)))))

    def _add_branch(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """result + branch(x), as one step where that rounds nowhere else and all weights may be
        read."""
        key = adapter_name, result.dtype
        if (
            self.kept
            and key in self.kept
            and not torch.is_grad_enabled()
            and result.is_contiguous()
        ):
            *branch, may_write = self.kept[key]
            return add_branch(result if may_write else result.clone(), x.to(result.dtype), *branch)
        A, B, gate, dropout_x, dropout = self.parts(adapter_name)
        dtype = autocast_dtype(x.device) or A.weight.dtype
        may_read = (
            is_plain(A, nn.Linear)
            and is_plain(B, nn.Linear)
            and is_plain(gate, LearnedGate, *GATES.values())
        )
        if not (
            may_read and not is_transformed() and result.dtype == dtype and result.is_contiguous()
        ):
            return (result + self.branch(x, adapter_name)).to(result.dtype)
        # Others may hold the output of a base layer with hooks, or need it in backward. A bias
        # returns a view, which autograd does not let an in-place operation change.
        may_write = is_plain(self.base_layer, nn.Linear, Conv1D)
        if not may_write or (torch.is_grad_enabled() and result._is_view()):
            result = result.clone()
        scaling = self.scaling[adapter_name]
        hidden = Hidden.of_call(gate, dropout_x, dropout)
        if self.kept is not None and not (hidden.p_x or hidden.p):
            # Copies: a sharded weight is whole only during the call.
            weights = (part.weight.detach().to(dtype, copy=True) for part in (A, B))
            self.kept[key] = *weights, scaling, hidden, may_write
        return add_branch(
            result, x.to(dtype), A.weight.to(dtype), B.weight.to(dtype), scaling, hidden
        )


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """Lets CeRA layers cast their weights once for all calls without gradient in eval mode.

        with torch.no_grad(), for_inference(model):
            model.generate(**inputs)

    Adapters may be switched inside. Their weights may not change, nor may what autocast casts to.
    The results are the same to the bit. Every active adapter takes its weights' memory once more in
    the precision that it computes in.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CeraLinear)]
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in; None where it is off, or where the device has none, as
    the meta device."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether it is of one of these classes, and a call of it does what its class does.

    FSDP1, ZeRO-3 and offloading fetch a weight at the call, and a hook may keep the output.
    """
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return (
        type(module) in classes
        and not any(hooks)
        and not {"forward", "_hf_hook"} & vars(module).keys()
    )


def is_transformed() -> bool:
    """Whether torch.compile or torch.func reads the operations: neither could read into
    `add_branch`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear projection.

    Raises:
        TypeError: the layer is of another kind (an embedding, a convolution), or
            nn.MultiheadAttention's, which reads the weight without calling the module: a branch
            would never run.
    """
    if isinstance(layer, Conv1D):  # stores W transposed: [d_in, d_out]
        return layer.weight.shape[0], layer.weight.shape[1]
    if isinstance(layer, nn.Linear) and not isinstance(
        layer, nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return layer.in_features, layer.out_features  # bitsandbytes' linears too
    raise TypeError(
        "CeRA adapts linear projections that are called (nn.Linear, Conv1D, bitsandbytes 4-bit "
        "and 8-bit), not "
        f"{type(layer).__name__}."
    )
