"""Layers that keep less for backward have bit-identical outputs and fewer bytes; compiled layers
stay compiled and have the gradients of eager ones."""

import contextlib
import copy
import functools
import logging
import random
from collections.abc import Callable

import peft
import pytest
import torch
from conftest import make_tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from benchmarks.tiny_models import tiny_config
from cera_train.adapters.build import build
from cera_train.cera import CeraConfig
from cera_train.model.batches import flat_batch
from cera_train.model.compiled import (
    at_recompile_limit,
    compile_layers,
    count_graphs,
    fall_back_to_eager,
)
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe
from cera_train.model.lean import keep_less
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.training import BatchLayout


def norm(dtype: torch.dtype) -> nn.Module:
    module = LlamaRMSNorm(48).to(dtype).requires_grad_(False)
    module.weight.copy_(1 + 0.3 * torch.randn(48))
    return module


def mlp(dtype: torch.dtype, act: str = "gelu_pytorch_tanh", kind: type = LlamaMLP) -> nn.Module:
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_attention_heads=4, hidden_act=act
    )
    return kind(config).to(dtype).requires_grad_(False)


def lean(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    keep_less(changed)
    return changed


def passes(
    module: nn.Module, x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The output, the gradient of the input, and the bytes that autograd keeps, except weights."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    (gradient,) = torch.autograd.grad(output, x, grad)
    return output, gradient, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [norm, mlp])
def test_outputs_are_bit_identical_and_gradients_at_least_as_exact(make, dtype):
    torch.manual_seed(1)
    module = make(dtype)
    x = torch.randn(2, 9, 48, dtype=dtype)
    grad = torch.randn(2, 9, 48, dtype=dtype)
    output, gradient, _ = passes(module, x, grad)
    lean_output, lean_gradient, _ = passes(lean(module), x, grad)
    assert torch.equal(lean_output, output)
    # The norm computes in float32 for any input, so float32 is exact enough.
    wide = torch.float64 if make is not norm else torch.float32
    _, exact, _ = passes(copy.deepcopy(module).to(wide), x.to(wide), grad.to(wide))
    lean_error, error = (
        float((each.double() - exact.double()).norm()) for each in (lean_gradient, gradient)
    )
    assert lean_error <= max(1.1 * error, 1e-6 * float(exact.norm()))


def test_a_norm_keeps_only_its_raw_input_and_an_mlp_only_gate_and_up():
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert passes(lean(norm(x.dtype)), x, x)[2] == 3 * 48 * 2 + 3 * 4  # and 1 / rms in float32
    assert passes(lean(mlp(x.dtype)), x, x)[2] == 2 * 3 * 96 * 2


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Olmo2RMSNorm, Clamped])
def test_a_layer_that_computes_something_else_is_left_unchanged(kind):
    module = mlp(torch.float32, kind=kind) if kind is Clamped else kind(48)
    keep_less(module)
    assert type(module) is kind


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_layer_of_common_models_is_changed_before_weights_are_loaded(kind):
    config = tiny_config(kind)
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        keep_less(model)
    names = [name for name, module in model.named_modules() if name.endswith(("norm", "mlp"))]
    changed = [
        name for name, module in model.named_modules() if type(module).__name__.startswith("Lean")
    ]
    assert sorted(changed) == sorted(names)
    assert torch.equal(torch.random.get_rng_state(), state)


LIMIT = 4
"""Variants of a layer that torch compiles here; else 8."""


def micro_batches():
    numbers = random.Random(0)
    for sequences in range(1, 13):
        rows = [
            [numbers.randrange(64) for _ in range(numbers.randint(3, 9))] for _ in range(sequences)
        ]
        yield flat_batch(rows, [[False] + [True] * (len(row) - 1) for row in rows])


def make_language_model(dtype: str, dropout: float, checkpointing: bool) -> LanguageModel:
    model = (
        make_tiny_llama(vocab_size=64, num_hidden_layers=LIMIT + 1)
        .to(getattr(torch, dtype))
        .requires_grad_(False)
    )
    keep_less(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = CeraConfig(r=4, dropout=dropout, init_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    autocast = (
        contextlib.nullcontext
        if dtype == "float32"
        else lambda: torch.autocast("cpu", torch.bfloat16)
    )
    language_model = LanguageModel(adapted, model, autocast)
    probe(language_model)
    language_model.use_flat_batches()
    return language_model.train()


def shard(language_model: LanguageModel) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in language_model.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(language_model, mesh=mesh)


@pytest.fixture
def graphs(request):
    """Collects the graphs of layers that `compile_layers(graphs.add)` compiled."""
    logging.disable(logging.DEBUG)  # pytest would keep thousands of torch's log lines
    limit = getattr(request, "param", LIMIT)
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield Graphs()
    logging.disable(logging.NOTSET)
    torch.compiler.reset()
    torch.compiler.set_stance("default")


class Graphs(list):
    def add(self, graph: torch.fx.GraphModule, inputs: object) -> Callable:
        self.append(graph)
        return graph.forward


def gradients(language_model: LanguageModel, graphs: list) -> tuple[list[torch.Tensor], list[int]]:
    """The gradients of every trained weight over all micro-batches, and how many graphs there were
    after each."""
    counts = []
    for batch in micro_batches():
        language_model(batch).sum().backward()
        counts.append(len(graphs))
    grads = [weight.grad for weight in language_model.parameters() if weight.requires_grad]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads], counts


@pytest.mark.parametrize(
    ("dtype", "dropout", "checkpointing", "is_sharded"),
    [
        ("float32", 0.0, False, False),
        pytest.param("bfloat16", 0.1, True, False, marks=pytest.mark.nightly),
        pytest.param("float32", 0.0, True, True, marks=pytest.mark.slow),
    ],
)
def test_layers_stay_compiled_for_any_number_of_sequences(
    graphs, team_of_one, dtype, dropout, checkpointing, is_sharded
):
    compiled = make_language_model(dtype, dropout, checkpointing)
    if is_sharded:
        shard(compiled)
    compile_layers(compiled, graphs.add)
    got, counts = gradients(compiled, graphs)
    assert counts == [counts[0]] * len(counts)
    assert counts[0] >= 2
    assert not at_recompile_limit()
    if not dropout:
        expected, _ = gradients(make_language_model(dtype, dropout, checkpointing), graphs)
        for ours, eager in zip(got, expected, strict=True):
            assert (ours - eager).norm() <= 1e-6 * eager.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("graphs", [8], indirect=True, ids=["torchs_limit"])
@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("cera", "none"),
        pytest.param("cera", "nf4", marks=pytest.mark.slow),
    ],
)
def test_a_layer_has_seven_graphs_and_eleven_with_an_evaluation(
    graphs, tmp_path, kind, quantization
):
    make_tiny_llama(64, hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), dtype="bfloat16", quantization=Quantization(quantization))
    base = load_model(config, torch.device("cpu"))
    adapter = AdapterConfig(AdapterKind(kind), 4, dropout=0.1, target_modules="all-linear")
    model = build(base, adapter)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    language_model = LanguageModel(model, base, autocast)
    choose_layout(BatchLayout.flat, language_model, base.device)
    compile_layers(language_model, graphs.add)
    batches = list(micro_batches())[3:6]

    def update() -> None:
        for batch in batches:
            language_model.train()(batch).sum().backward()

    update()
    assert len(graphs) == 7
    with torch.no_grad():
        for batch in batches:
            language_model.eval()(batch)
    assert len(graphs) == 11
    update()
    assert len(graphs) == count_graphs() == 11
    assert not at_recompile_limit()
    assert language_model.fallbacks == []


class Widening(nn.Module):
    """A layer of another width at each call: torch compiles few variants of it."""

    def forward(self, x: torch.Tensor, width: object) -> torch.Tensor:
        return x * len(width)


def test_layers_run_eagerly_once_torch_refuses_a_variant(graphs):
    language_model = make_language_model("float32", 0.0, checkpointing=False)
    layer = Widening()
    language_model.causal_lm.model.layers.append(layer)
    language_model.causal_lm._no_split_modules = {"Widening"}
    compile_layers(language_model, graphs.add)
    for width in range(LIMIT + 4):
        assert layer(torch.ones(3), ["x"] * width).sum() == 3 * width
    assert language_model.is_compiled
    assert at_recompile_limit()
    fall_back_to_eager(language_model)
    assert not language_model.is_compiled
    assert language_model.fallbacks == ["eager layers: torch compiles no further variant of them"]
    count = len(graphs)
    layer(torch.ones(3), ["x"])
    assert len(graphs) == count
