"""Every family of architectures, tiny and random: it attaches, trains, generates, packs, saves and
loads, plans, and trains over 4-bit weights.

`make architectures` runs these tests and writes docs/architectures.md from what they record.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, STATES, Architecture
from torch import nn

from cera_train.adapters import build as adapters
from cera_train.adapters import saved
from cera_train.adapters.targets import linear_names
from cera_train.cera.coverage import check_coverage
from cera_train.cera.model import keep_scale
from cera_train.common.errors import UserError
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe
from cera_train.model.weights import load_model
from cera_train.planning.make import make_plan
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization
from cera_train.settings.training import BatchLayout

CPU = torch.device("cpu")
STATEFUL = {family.model_type for family in STATES}
QUICK = ("llama", "gpt2", "mixtral", "mamba", "qwen3_next")
"""Families that are tested with the fast tests."""

MECHANISMS = ("gemma2", "phi3", "bloom", "gpt_oss", "deepseek_v3", "jamba", "rwkv")
"""Families tested in CI: a window and capped scores, a fused projection, positions as biases,
sinks, latent attention, layers of several kinds, and a state without a cache."""

WITHOUT_CACHE = ("rwkv", "xlstm")
"""transformers' own models of these families fail with a cache, or write other tokens than without
one."""

ROWS = [[5, 17, 99, 4, 250, 31, 8, 60], [7, 7, 300, 12, 3], [401, 2, 45, 46, 6, 9, 120]]
MASKS = [[False, True, True] + [True] * (len(row) - 3) for row in ROWS]
IDS = torch.tensor([ROWS[0], ROWS[0][::-1]])


def families(*in_ci: str) -> pytest.MarkDecorator:
    """A test for every family: those of QUICK at once, these in CI, the others nightly."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        if name in QUICK:
            return []
        return [pytest.mark.slow if name in in_ci else pytest.mark.nightly]

    cases = [
        pytest.param(family, id=name, marks=marks(name)) for name, family in ARCHITECTURES.items()
    ]
    return pytest.mark.parametrize("family", cases)


every_family = families(*MECHANISMS)
pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning",
    # PEFT's, of a model that was made in memory
    "ignore:Could not find a config file in:UserWarning",
)


@pytest.fixture
def cell(record_property) -> Callable[[str], None]:
    """cell("flat") records the table entry of this family and test."""
    return lambda text: record_property("cell", text)


def adapted(base: nn.Module, targets: Any, **settings: Any) -> nn.Module:
    return adapters.build(
        base, AdapterConfig(r=4, target_modules=targets, **{"alpha": None} | settings)
    )


def randomise(model: nn.Module) -> nn.Module:
    """Gives B random numbers, so that the adapter changes the model."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "cera_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def batch_of(language_model: LanguageModel) -> Batch:
    return (flat_batch if language_model.is_flat else padded_batch)(ROWS, MASKS)


def prove(language_model: LanguageModel) -> None:
    """Raises where an adapter does not run or gets no gradient."""
    with check_coverage(language_model.model):
        language_model.train()(batch_of(language_model)).sum().backward()
    language_model.zero_grad()


def losses_of(language_model: LanguageModel, updates: int = 8) -> list[float]:
    """The loss of a few updates on the same rows."""
    batch = batch_of(language_model)
    weights = [weight for weight in language_model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.03)
    losses = []
    for _ in range(updates):
        loss = language_model.train()(batch).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_family
def test_attaches(family: Architecture, cell):
    """all-linear: a fresh adapter changes nothing; each of its modules by itself moves the logits,
    and without dropout train mode equals eval mode."""
    dropouts = [
        name
        for name, value in family.config().to_dict().items()
        if "drop" in name and isinstance(value, float)
    ]
    base = family.model(**dict.fromkeys(dropouts, 0.0))
    keep_scale(base)
    expected = logits(base)
    skipped = set(adapters.left_out(base, AdapterConfig(r=4, target_modules="all-linear")))
    model = adapted(base, "all-linear")
    assert torch.equal(logits(model), expected)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    linears = {
        name for name, module in family.model().named_modules() if linear_names([(name, module)])
    }
    assert len(layers) == len(linears - skipped) - 1  # except the head
    for layer in layers:
        weight = layer.cera_B["default"].weight
        nn.init.normal_(weight)
        assert not torch.equal(logits(model), expected)
        nn.init.zeros_(weight)
    expected = logits(randomise(model))
    with torch.no_grad():
        trained = model.train()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)
    names = sorted({name.rpartition(".")[2] for name in skipped})
    cell(f"all but {', '.join(names)}" if names else "all")


@every_family
def test_trains(family: Architecture, cell):
    """Coverage is proven and the loss falls, over the targets of the family and over all-linear."""
    for targets in (list(family.targets), "all-linear"):
        base = family.model()
        language_model = LanguageModel(adapted(base, targets, dropout=0.1), base)
        choose_layout(BatchLayout.auto, language_model, CPU)
        prove(language_model)
        losses = losses_of(language_model)
        assert losses[-1] < 0.99 * losses[0]
    cell("yes")


@every_family
def test_generates(family: Architecture, cell):
    """With a cache, token by token, it writes what whole passes without a cache predict."""
    model = randomise(adapted(family.model(), list(family.targets))).eval()
    has_cache = family.model_type not in WITHOUT_CACHE
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    settings |= {"use_cache": has_cache, "attention_mask": torch.ones_like(IDS)}
    tokens = model.generate(input_ids=IDS, **settings)
    expected = IDS
    with torch.no_grad():
        for _ in range(6):
            next_tokens = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, next_tokens[:, None]], dim=1)
    assert tokens.tolist() == expected.tolist()
    assert tokens.tolist() != family.model().generate(input_ids=IDS, **settings).tolist()
    cell("yes" if has_cache else "without a cache")


@every_family
def test_packs(family: Architecture, cell):
    """The layout that the probe allows gives the loss and the gradients of one row at a time; and
    if it allows no flat rows, sequences that share a row do see each other."""
    base = family.model()
    language_model = LanguageModel(randomise(adapted(base, list(family.targets))), base)
    allowed = probe(language_model)
    language_model.eval()  # GPT-2 drops hidden states by default

    def loss_and_gradients(batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = sum(language_model(batch).sum() for batch in batches)
        weights = [weight for weight in language_model.parameters() if weight.requires_grad]
        return loss.detach(), list(torch.autograd.grad(loss, weights))

    apart = [padded_batch([row], [mask]) for row, mask in zip(ROWS, MASKS, strict=True)]
    expected = loss_and_gradients(apart)
    torch.testing.assert_close(
        loss_and_gradients([padded_batch(ROWS, MASKS)]), expected, rtol=1e-3, atol=1e-4
    )
    if allowed.flattens:
        language_model.use_flat_batches()
        torch.testing.assert_close(
            loss_and_gradients([flat_batch(ROWS, MASKS)]), expected, rtol=1e-3, atol=1e-4
        )
        assert not moves_the_next(language_model)
    else:
        with pytest.raises(UserError, match="train.batch_layout=flat: .* Use padded"):
            choose_layout(BatchLayout.flat, language_model, CPU)
        assert moves_the_next(language_model)
    assert not (allowed.flattens and family.model_type in STATEFUL)
    cell("flat rows" if allowed.flattens else "padded rows")


def moves_the_next(language_model: LanguageModel) -> bool:
    """Whether another first sequence of a flat row changes the loss of the others."""
    masks = [[False] * len(MASKS[0]), *MASKS[1:]]
    with torch.no_grad():
        before, after = (
            language_model(flat_batch([first, *ROWS[1:]], masks)).sum()
            for first in (ROWS[0], [9, *ROWS[0][:0:-1]])
        )
    return abs(float(after / before) - 1) > 1e-5


@every_family
def test_saves_and_loads(family: Architecture, cell, tmp_path):
    """A saved adapter gives the same logits on another copy of the base, by our loading and by
    PEFT's."""
    model = randomise(adapted(family.model(), "all-linear"))
    expected = logits(model)
    weights = {
        name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad
    }
    saved.save(model, weights, tmp_path)
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(family.model(), str(tmp_path))), expected
    )
    assert torch.equal(logits(saved.attach(family.model(), tmp_path)), expected)
    cell("yes")


@pytest.mark.slow
@families()
def test_plans(family: Architecture, cell, compose, tmp_path):
    """cera-plan counts it from its config.json alone."""
    family.config().save_pretrained(tmp_path)
    targets = f"adapter.target_modules=[{','.join(family.targets)}]"
    base = ["+recipe=logistic_map", f"model.path={tmp_path}", "adapter.r=4", "plan.gpu=h100"]
    small = ["data.max_length=16", "train.micro_batch_tokens=32", "train.batch_size=2"]
    plan = make_plan(compose(*base, targets, *small, command="plan"))
    trainable, total = adapters.parameter_counts(adapted(family.model(), list(family.targets)))
    assert (plan.trainable, plan.frozen) == (trainable, total - trainable)
    assert plan.peak > 0
    cell("yes")


@families()
def test_trains_over_4_bits(family: Architecture, cell, tmp_path, tokenizer):
    """NF4 on this CPU: coverage is proven and the loss falls."""
    family.model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_model(
        ModelConfig(str(tmp_path), dtype=Dtype.float32, quantization=Quantization.nf4), CPU
    )
    language_model = LanguageModel(adapted(base, list(family.targets)), base)
    choose_layout(BatchLayout.auto, language_model, CPU)
    prove(language_model)
    losses = losses_of(language_model)
    assert losses[-1] < losses[0]
    cell("yes")
