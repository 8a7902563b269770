"""y = W0 x + s B dropout(gate(A x)): a branch that is non-linear in x, so it is never merged into
W0.

W0 is never read, only called: the same layer stands on nn.Linear, transformers' Conv1D and
bitsandbytes' 4-bit and 8-bit linears. All adapters of a projection live in one layer, by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .branch import FusedBranch, Hidden, start_branch
from .config import CeraConfig
from .gates import GATES, LearnedGate

LINEARS_4BIT = ()
"""bitsandbytes' class, where it is installed."""
if is_bnb_4bit_available():
    from bitsandbytes.nn import Linear4bit

    LINEARS_4BIT = (Linear4bit,)


class CeraLayer(nn.Module, BaseTunerLayer):
    """CeRA branches beside a frozen base, by the names of their adapters."""

    adapter_layer_names = ("cera_A", "cera_B", "cera_gate")
    module_names = (*adapter_layer_names, "cera_dropout_x", "cera_dropout")
    other_param_names = ("cera_dropout_x", "cera_dropout", "r", "scaling")

    cast_input_dtype_enabled = True
    """Whether x is cast to the adapter's dtype; `peft.helpers.disable_input_dtype_casting` sets
    it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.module_names:
            setattr(self, name, nn.ModuleDict())
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._active_adapter = adapter_name
        # A new module is in train mode and would apply dropout in a model in eval mode.
        self.train(base_layer.training)
        self.update_layer(adapter_name, config)

    def _make_parts(self, A: nn.Module, B: nn.Module, config: CeraConfig) -> dict[str, Any]:
        """A fresh branch, by the names of the containers."""
        gate = GATES[config.activation]()
        gate = LearnedGate(gate, A.weight.dtype) if config.mix == "learned" else gate
        start_branch(A.weight, B.weight, gate, config)
        drops_x = config.dropout_on == "input"
        dropout_x = nn.Dropout(config.dropout if drops_x else 0.0).train(self.training)
        dropout = nn.Dropout(0.0 if drops_x else config.dropout).train(self.training)
        modules = {
            "cera_A": A,
            "cera_B": B,
            "cera_gate": gate,
            "cera_dropout_x": dropout_x,
            "cera_dropout": dropout,
        }
        return modules | {"r": config.r, "scaling": config.scaling}

    def _add(self, adapter_name: str, parts: dict[str, Any], config: CeraConfig) -> None:
        """Adds a branch, or replaces the one of that name."""
        for name, part in parts.items():
            getattr(self, name)[adapter_name] = part
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
        return [getattr(self, name)[adapter_name] for name in self.module_names]


class CeraLinear(CeraLayer):
    """A frozen linear projection with CeRA branches beside it.

    Args:
        base_layer: the projection W0, [..., d_in] -> [..., d_out].
        adapter_name: the first adapter.
        config: its settings.

    Raises:
        TypeError: the base layer is not a linear projection.
    """

    prepared: dict[tuple[str, torch.dtype], FusedBranch] | None = None
    """Branches by adapter and the output's dtype, inside `for_inference`; None outside."""

    def update_layer(self, adapter_name: str, config: CeraConfig) -> None:
        """Adds an adapter, or replaces the one of that name."""
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        A = nn.Linear(self.in_features, config.r, bias=False, dtype=self.adapter_dtype)
        B = nn.Linear(config.r, self.out_features, bias=False, dtype=self.adapter_dtype)
        self._add(adapter_name, self._make_parts(A, B, config), config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """W0 x + s B dropout(gate(A x)), with a branch for every active adapter."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name not in self.cera_A:
                continue
            fused = self.fused_branch(result, adapter_name)
            if fused:
                result = fused.add_to(result, x)
            else:
                result = (result + self.branch(x, adapter_name)).to(result.dtype)
        return result

    def branch(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """s B dropout(gate(A x)) of one adapter, the plain formula: [..., d_in] -> [..., d_out]."""
        A, B, gate, dropout_x, dropout = self.parts(adapter_name)
        if autocast_dtype(x.device) is None:
            # The weights are float32 over a 16-bit base. Autocast would cast x back to 16 bits.
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.scaling[adapter_name] * B(dropout(gate(A(dropout_x(x)))))

    def can_fuse(self, result: torch.Tensor, adapter_name: str) -> bool:
        """Whether a `FusedBranch` may be added to `result` instead of the plain formula."""
        A, B, gate, *_ = self.parts(adapter_name)
        return (
            # torch.compile and torch.func need to see every operation.
            not is_transformed()
            # FSDP1, ZeRO-3 and offloading fetch a weight when its module is called, and a hook may
            # change what the module returns.
            and is_plain(A, nn.Linear)
            and is_plain(B, nn.Linear)
            and is_plain(gate, LearnedGate, *GATES.values())
            # If the branch has another dtype, only the plain formula rounds the sum just once.
            and result.dtype == (autocast_dtype(result.device) or A.weight.dtype)
            # The product with B is added to the rows of `result` in place.
            and result.is_contiguous()
        )

    def fused_branch(self, result: torch.Tensor, adapter_name: str) -> FusedBranch | None:
        """An adapter's branch, to be added to `result` in one step; None where `can_fuse` is false.
        Inside `for_inference`, the first call prepares it for all."""
        key = adapter_name, result.dtype
        may_reuse = self.prepared is not None and not torch.is_grad_enabled()
        if may_reuse and key in self.prepared and result.is_contiguous():
            return self.prepared[key]
        if not self.can_fuse(result, adapter_name):
            return None

        A, B, gate, dropout_x, dropout = self.parts(adapter_name)
        hidden = Hidden.of_call(gate, dropout_x, dropout)
        is_reused = may_reuse and not (hidden.p or hidden.p_x)
        fused = FusedBranch(
            # Reused weights are copies: a sharded weight is whole only during the call.
            A=A.weight.to(result.dtype, copy=is_reused),
            B=B.weight.to(result.dtype, copy=is_reused),
            scaling=self.scaling[adapter_name],
            hidden=hidden,
            overwrites=self._may_overwrite_output(),
        )
        if is_reused:
            self.prepared[key] = fused
        return fused

    def _may_overwrite_output(self) -> bool:
        """Whether nothing else needs the output of the base layer."""
        # A hook may have kept it, and a layer of another class may need it in backward.
        if not is_plain(self.base_layer, nn.Linear, Conv1D, *LINEARS_4BIT):
            return False
        # With a bias it is a view, and writing through one costs autograd more than a copy.
        return self.base_layer.bias is None or not torch.is_grad_enabled()


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """Lets CeRA layers cast their branches once for all calls without gradient in eval mode.

        with torch.no_grad(), for_inference(model):
            model.generate(**inputs)

    Adapters may be switched inside. Their weights and hooks must not change, nor autocast's dtype.
    The results are the same to the bit where x is contiguous. Every active adapter takes its
    weights' memory once more, in the dtype that it computes in.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CeraLinear)]
    for layer in layers:
        layer.prepared = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.prepared = None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in; None where it is off, or where the device has none, as
    the meta device."""
    # Not torch.amp.is_autocast_available: torch 2.11 breaks a compiled graph there.
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether a module is of one of these classes, and calling it does no more than its class
    does."""
    # torch has no public way to ask for hooks, and accelerate's replace `forward` in the module.
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) in classes and not any(hooks) and "forward" not in vars(module)


def is_transformed() -> bool:
    """Whether torch.compile or torch.func transforms the operations."""
    # torch.func has no public counterpart of is_compiling().
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
        "CeRA adapts linear projections that are called (nn.Linear, Conv1D, bitsandbytes 4-bit and "
        f"8-bit), not {type(layer).__name__}."
    )
