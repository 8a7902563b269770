"""Compiled layers stay compiled and have the gradients of eager ones."""

import logging
import random
from collections.abc import Callable

import peft
import pytest
import torch
from conftest import make_tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cera_train.adapters.build import build
from cera_train.cera import CeraConfig
from cera_train.model.batches import flat_batch
from cera_train.model.compiled import compile_layers, count_graphs
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe
from cera_train.model.lean import keep_less
from cera_train.model.weights import load_model
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization

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
    autocast = None if dtype == "float32" else Dtype.bfloat16
    language_model = LanguageModel(adapted, model, autocast)
    probe(language_model)
    language_model.use_flat_batches()
    return language_model.train()


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
        mesh = init_device_mesh("cpu", (1,))
        for layer in compiled.causal_lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(compiled, mesh=mesh)
    compile_layers(compiled, graphs.add)
    got, counts = gradients(compiled, graphs)
    # where dropout draws, the second batch and the third add one each
    assert len({*counts[2 if dropout else 0 :]}) == 1
    assert counts[0] >= 2
    if not dropout:
        expected, _ = gradients(make_language_model(dtype, dropout, checkpointing), graphs)
        for ours, eager in zip(got, expected, strict=True):
            assert (ours - eager).norm() <= 1e-6 * eager.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("graphs", [8], indirect=True, ids=["torchs_limit"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_layer_has_seven_graphs_and_eleven_with_an_evaluation(graphs, tmp_path, quantization):
    make_tiny_llama(64, hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), dtype="bfloat16", quantization=Quantization(quantization))
    base = load_model(config, torch.device("cpu"))
    model = build(base, AdapterConfig(r=4, dropout=0.1, target_modules="all-linear"))
    language_model = LanguageModel(model, base, Dtype.bfloat16)
    choose_layout(language_model)
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
