"""y = W_e x + s B_e dropout(gate(A_e x)) for every expert e of a mixture, in the experts'
projections.

transformers keeps the experts of a layer as 3-D parameters, W: [E, out, in]. A layer in their place
sorts the tokens by expert, runs the base's grouped product, and adds the branch to gate and up
before their product, to down before the routing weights. A: [E, r, in], B: [E, out, r].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import _grouped_mm

from .branch import Hidden
from .config import CeraConfig
from .layer import CeraLayer, autocast_dtype, is_transformed


@dataclass
class Routing:
    """Pairs of a token and one of its experts, sorted by expert."""

    order: torch.Tensor  # places of the pairs in top_k_index, flattened, [S]
    tokens: torch.Tensor  # the pairs' tokens, [S]
    experts: torch.Tensor  # the pairs' experts, ascending, [S]
    ends: torch.Tensor  # the place after the last pair of every expert, int32, [E]

    @classmethod
    def by_expert(cls, top_k_index: torch.Tensor, num_experts: int) -> Routing:
        """The routing of top_k_index, [tokens, k]."""
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        every_expert = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
        return cls(order, order // top_k_index.shape[-1], experts, ends)


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x, sorted by expert, times their expert's matrix: [S, in], [E, in, out] -> [S,
    out]."""
    # torch's grouped product takes no float64, and only rows of a multiple of 16 bytes.
    if x.dtype == torch.float64 or any(width * x.element_size() % 16 for width in weight.shape[1:]):
        return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
    return _grouped_mm(x, weight, ends)


# --- the layer ------------------------------------------------------------------------------------


class ExpertMatrices(nn.Module):
    """One matrix for each expert, [E, out, in]."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, **kwargs: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **kwargs))

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Rows sorted by expert, [S, in] -> [S, out], in x's dtype."""
        return grouped_product(x, self.weight.to(x.dtype).transpose(-2, -1), routing.ends)


class CeraExperts(CeraLayer):
    """Frozen experts with CeRA branches beside their projections.

    An adapter's A and B hold one `ExpertMatrices` for each adapted parameter, by its name. The
    experts of a parameter share a gate that learns. With an active branch, the layer computes from
    the base's weights and does not call it: hooks on the base do not run.

    Args:
        base_layer: a module of experts that transformers calls through its interface.
        adapter_name: the first adapter.
        configs: its settings by the name of a parameter to adapt.

    Raises:
        TypeError: the experts cannot be called with branches.
    """

    def update_layer(self, adapter_name: str, configs: dict[str, CeraConfig]) -> None:
        """Adds an adapter, or replaces the one of that name."""
        check_experts(self.base_layer, configs)
        parts = {name: nn.ModuleDict() for name in self.module_names} | {"r": {}, "scaling": {}}
        for parameter, config in configs.items():
            num_experts, d_in, d_out = expert_features(self.base_layer, parameter)
            A = ExpertMatrices(num_experts, d_in, config.r, dtype=self.adapter_dtype)
            B = ExpertMatrices(num_experts, config.r, d_out, dtype=self.adapter_dtype)
            for name, part in self._make_parts(A, B, config).items():
                parts[name][parameter] = part
        self._add(adapter_name, parts, config)

    @property
    def base_dtype(self) -> torch.dtype:
        return self.base_layer.down_proj.dtype

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return base_layer.down_proj.device, None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts with their active branches; without any, the base's by the implementation
        that the model is set to.

        Args:
            hidden_states: [tokens, d].
            top_k_index: the experts of every token, [tokens, k].
            top_k_weights: their weights, [tokens, k].
        """
        experts = self.base_layer
        is_adapted = any(name in self.cera_A for name in self.active_adapters)
        if self.disable_adapters or not is_adapted:
            return experts(hidden_states, top_k_index, top_k_weights)
        routing = Routing.by_expert(top_k_index, experts.num_experts)
        up = "gate_up_proj" if experts.has_gate else "up_proj"
        x = self._project(up, hidden_states[routing.tokens], routing)
        # transformers names some parts of its interface with an underscore, and has no others.
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = self._project("down_proj", x, routing)
        if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 knows none
            x = experts.post_expert_norm(x)
        weighted = x * top_k_weights.reshape(-1)[routing.order, None]
        unsorted = torch.empty_like(routing.order)
        unsorted[routing.order] = torch.arange(len(unsorted), device=unsorted.device)
        outputs = weighted[unsorted].view(*top_k_index.shape, weighted.shape[-1])
        # A sum over k, not index_add_, which on CUDA adds in any order.
        return outputs.sum(1).to(hidden_states.dtype)

    def _project(self, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """W_e x of one projection with its active branches, [S, d_in] -> [S, d_out]."""
        experts = self.base_layer
        weight = getattr(experts, name)
        W = weight if experts.is_transposed else weight.transpose(-2, -1)
        result = grouped_product(x.to(weight.dtype), W, routing.ends)
        if experts.has_bias:
            result = result + getattr(experts, f"{name}_bias")[routing.experts]
        for adapter_name in self.active_adapters:
            if adapter_name in self.cera_A and name in self.cera_A[adapter_name]:
                result = result.add_(self.branch(x, adapter_name, name, routing))
        return result

    def branch(
        self, x: torch.Tensor, adapter_name: str, name: str, routing: Routing
    ) -> torch.Tensor:
        """s B_e dropout(gate(A_e x)), which one adapter adds to a projection, [S, d_in] -> [S,
        d_out]."""
        A, B, gate, dropout_x, dropout = (part[name] for part in self.parts(adapter_name))
        dtype = autocast_dtype(x.device)
        x = self._cast_input_dtype(x, A.weight.dtype) if dtype is None else x.to(dtype)
        if is_transformed():  # a graph has no place for a seed that Python reads
            h = dropout(gate(A(dropout_x(x), routing)))
        else:
            hidden = Hidden.of_call(gate, dropout_x, dropout)
            h = hidden(A(hidden.drop_x(x), routing))
        return B(h * self.scaling[adapter_name][name], routing)


# --- what can be adapted --------------------------------------------------------------------------


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the projections in a module of experts, which are its parameters; empty for any
    other module."""
    parameters = dict(module.named_parameters(recurse=False))
    if "down_proj" not in parameters or parameters["down_proj"].ndim < 3:
        return []
    return [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in parameters]


def expert_names(model: nn.Module) -> list[str]:
    """The last two parts of the names of the experts' projections, each once."""
    names = []
    for key, module in model.named_modules():
        module_name = key.removesuffix(".base_layer").rpartition(".")[2]
        names += [f"{module_name}.{name}" for name in expert_parameters(module)]
    return list(dict.fromkeys(names))


def expert_features(experts: nn.Module, name: str) -> tuple[int, int, int]:
    """(number of experts, d_in, d_out) of an experts' parameter."""
    num_experts, *sides = getattr(experts, name).shape
    d_in, d_out = sides if experts.is_transposed else reversed(sides)
    return num_experts, d_in, d_out


def check_experts(experts: nn.Module, parameters: Iterable[str]) -> None:
    """Raises TypeError where branches cannot be added to these parameters of a module."""
    kind = type(experts).__name__
    adaptable = expert_parameters(experts)
    for name in parameters:
        weight = getattr(experts, name)
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise TypeError(
                f"{name} of {kind} is quantised ({weight.dtype}), and its kernel takes no branch: "
                "load the experts in 16 or 32 bits."
            )
        if not hasattr(experts, "is_transposed"):
            raise TypeError(
                f"{kind} does not run through transformers' experts interface, so no branch would "
                "run."
            )
        if name not in adaptable:
            raise TypeError(
                f"{name} of {kind} is no projection of experts: target {' or '.join(adaptable)}."
            )
