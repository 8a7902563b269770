"""What the compiler saves in a layer of Llama-3.1-8B with CeRA, counted without a GPU: bytes that
element-wise kernels move for a token, and kernels, in a forward and a backward pass.

    python -m benchmarks.compiled_layer             a minute, 2 GB

The setting is NeMo AutoModel's: r = 16 on all linears, dropout 0.1, bf16. Inductor counts for CPUs,
where it fuses much as for GPUs. Products and attention are the same kernels in both: they count as
kernels, and their bytes do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from benchmarks.targets import Target, print_targets
from cera_train.adapters.build import build
from cera_train.cli.compose import compose
from cera_train.common.terminal import print_table
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.lean import keep_less
from cera_train.planning.dry_run import architecture_of
from cera_train.planning.meter import FORMULAS

TOKENS = 512

SETTINGS = (
    "+recipe=math_r64",
    "adapter.r=16",
    "adapter.alpha=32",
    "adapter.dropout=0.1",
    "adapter.target_modules=all-linear",
)

MB = 1e6


class Kernels:
    """How many there are, and the bytes that the element-wise ones read and write."""

    def __init__(self) -> None:
        self.count = self.bytes = 0

    def add(self, size: int) -> None:
        self.count += 1
        self.bytes += size


class EagerKernels(TorchDispatchMode, Kernels):
    """Those that operations run as they are written: all but views."""

    def __init__(self) -> None:
        super().__init__()
        Kernels.__init__(self)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = operation(*args, **(kwargs or {}))
        read = list(tensors((args, kwargs)))
        written = list(tensors(output))
        is_view = not operation._schema.is_mutable and set(map(storage, written)) <= set(
            map(storage, read)
        )
        if not is_view and "empty" not in operation.__name__:
            is_product = operation._overloadpacket in FORMULAS or "attention" in operation.__name__
            self.add(0 if is_product else sum(map(size_of, read + written)))
        return output


class CompiledKernels(Kernels):
    """Those of the graphs that inductor compiles meanwhile."""

    def compile_to_module(self) -> Callable[[GraphLowering], Any]:
        """GraphLowering.compile_to_module, counted."""
        compile_to_module = GraphLowering.compile_to_module

        def counted(graph: GraphLowering) -> Any:
            module = compile_to_module(graph)
            for node in graph.scheduler.nodes:
                if not isinstance(node, NopKernelSchedulerNode):
                    is_product = isinstance(node, ExternKernelSchedulerNode)
                    self.add(0 if is_product else node.get_read_write_buffers_sizes())
            return module

        return counted


def tensors(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, torch.Tensor))


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def size_of(tensor: torch.Tensor) -> int:
    # An expanded tensor stores less than its shape suggests.
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def adapted_layer() -> tuple[nn.Module, nn.Module]:
    """A layer with adapters, and its model's rotary embedding."""
    config = compose(*SETTINGS)
    architecture = architecture_of(config.model)
    architecture.update(
        {"num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    )
    base = AutoModelForCausalLM.from_config(
        architecture, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    base.requires_grad_(False)
    keep_less(base)
    build(base, config.adapter).train()
    return base.model.layers[0], base.model.rotary_emb


def run(
    layer: nn.Module, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, position_embeddings=position_embeddings)
    y.backward(torch.ones_like(y))


def count() -> tuple[Kernels, Kernels]:
    """Those of the layer eager, and compiled."""
    torch.manual_seed(0)
    layer, rotary = adapted_layer()
    x = torch.randn(1, TOKENS, layer.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    position_embeddings = rotary(x, torch.arange(TOKENS)[None])
    with EagerKernels() as eager:
        run(layer, x, position_embeddings)
    compiled = CompiledKernels()
    layer.compile(dynamic=True)
    with (
        patch.object(GraphLowering, "compile_to_module", compiled.compile_to_module()),
        inductor.patch(fx_graph_cache=False),  # a graph of a cache would not be counted
        functorch.patch(enable_autograd_cache=False),
    ):
        run(layer, x, position_embeddings)
    return eager, compiled


def targets(eager: Kernels, compiled: Kernels) -> list[Target]:
    return [
        Target(
            "element-wise bytes a token, compiled", [compiled.bytes / TOKENS / MB], 1.0, False, "MB"
        ),
        Target("kernels, compiled / eager", [compiled.count / eager.count], 0.5, False),
    ]


def main() -> None:
    quiet_libraries()
    eager, compiled = count()
    rows = [
        [name, f"{kernels.bytes / TOKENS / MB:.2f} MB", str(kernels.count)]
        for name, kernels in (("eager", eager), ("compiled", compiled))
    ]
    print_table(["layer", "element-wise, a token", "kernels"], rows, right=(1, 2))
    print_targets(targets(eager, compiled))


if __name__ == "__main__":
    main()
