"""`make architectures`: checks a tiny model of every causal type of transformers, and writes
docs/architectures.md from what it finds.

Cells are kept in outputs/architectures.json as they come: delete it to check all again.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pebble
import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks import cells
from benchmarks.cells import (
    ROOT,
    YES,
    Cells,
    check_close,
    check_resume,
    fill,
    in_short,
    meanings,
    require,
    table,
)
from benchmarks.rows import trained
from benchmarks.tiny_models import MODEL_TYPES, byte_tokenizer, tiny_model
from cera_train.adapters import build as adapters
from cera_train.adapters import saved
from cera_train.adapters.targets import linear_names
from cera_train.cera.coverage import EXPERT, check_coverage, projections_outside_text
from cera_train.cera.experts import expert_names
from cera_train.cli.compose import compose
from cera_train.common.errors import UserError
from cera_train.distributed.sharding import trainable_weights
from cera_train.model.batches import Batch, flat_batch, padded_batch
from cera_train.model.compiled import compile_layers
from cera_train.model.language_model import LanguageModel
from cera_train.model.layout import choose_layout, probe
from cera_train.model.weights import load_model
from cera_train.planning.dry_run import DryRun
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization
from cera_train.training.train import train

PAGE = ROOT / "docs" / "architectures.md"
FOUND = ROOT / "outputs" / "architectures.json"
SECONDS = 120
"""The time limit of a check."""

CPU = torch.device("cpu")
ROWS = [[5, 17, 99, 4, 250, 31, 8, 60], [7, 7, 300, 12, 3], [401, 2, 45, 46, 6, 9, 120]]
MASKS = [[False, True, True] + [True] * (len(row) - 3) for row in ROWS]
IDS = torch.tensor([ROWS[0], ROWS[0][::-1]])
BUILT = "built"
WIDTH = 64
BY_PARAMETER = "`adapter.experts`"
NO_EXPERTS = "none"
ALL = "all"
USUAL = (ALL, NO_EXPERTS)
"""Cells that the page leaves empty."""


@dataclass
class Subject:
    """A type of models, and a folder for its files."""

    model_type: str
    folder: Path

    def base(self) -> PreTrainedModel:
        return tiny_model(self.model_type)

    @cached_property
    def has_experts(self) -> bool:
        """Whether it has experts that an adapter reaches as parameters."""
        return experts(self) == BY_PARAMETER

    @cached_property
    def path(self) -> str:
        """A folder with a model and a tokenizer."""
        self.base().save_pretrained(self.folder)
        byte_tokenizer("<s>", bos_token="<s>").save_pretrained(self.folder)
        return str(self.folder)

    def words(self) -> list[str]:
        """The settings of its runs."""
        return [
            "+recipe=logistic_map",
            f"model.path={self.path}",
            "model.dtype=float32",
            "adapter.r=4",
            f"adapter.experts={self.has_experts}",
            "adapter.target_modules=all-linear",
        ]

    def adapted(self, base: PreTrainedModel | None = None) -> LanguageModel:
        """The model with a random adapter, in the layout of a run."""
        language_model = self.padded(base)
        choose_layout(language_model)
        return language_model

    def padded(self, base: PreTrainedModel | None = None) -> LanguageModel:
        """The model with a random adapter on all that can be adapted, for padded rows."""
        base = base or self.base()
        config = AdapterConfig(r=4, alpha=None, experts=self.has_experts)
        torch.manual_seed(1)
        language_model = LanguageModel(adapters.build(base, config), base)
        for name, weight in language_model.named_parameters():
            if "cera_B" in name:
                nn.init.normal_(weight, std=0.1)
        return language_model.eval()  # without the dropout that some types have by default


def batch_for(language_model: LanguageModel) -> Batch:
    return (flat_batch if language_model.is_flat else padded_batch)(ROWS, MASKS)


def loss_and_gradients(
    language_model: LanguageModel, *batches: Batch
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and gradients of these batches, or of the rows in the model's layout."""
    batches = batches or (batch_for(language_model),)
    loss = sum(language_model(batch).sum() for batch in batches)
    gradients = torch.autograd.grad(
        loss, trained(language_model), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), list(gradients)


def check_learns(language_model: LanguageModel) -> None:
    """Coverage is proven, and the loss falls."""
    batch = batch_for(language_model)
    with check_coverage(language_model.model):
        language_model.train()(batch).sum().backward()
    language_model.zero_grad()
    optimizer = torch.optim.AdamW(trained(language_model), lr=0.01)
    losses = []
    for _ in range(8):
        loss = language_model(batch).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    require(losses[-1] < losses[0], "the loss does not fall")


# --- the checks -----------------------------------------------------------------------------------


def rows(subject: Subject) -> str:
    """flat: sequences stand end to end in one row, by our attention or under the model's mask, with
    the loss and gradients of separate rows; padded where they would see each other."""
    language_model = subject.padded()
    allowed = probe(language_model)
    apart = [padded_batch([row], [mask]) for row, mask in zip(ROWS, MASKS, strict=True)]
    expected = loss_and_gradients(language_model, *apart)
    check_close(loss_and_gradients(language_model, padded_batch(ROWS, MASKS)), expected)
    if not allowed.flattens:
        require(moves_the_next(language_model), "padded, though flat rows are right")
        return "padded"
    language_model.use_flat_batches()
    check_close(loss_and_gradients(language_model, flat_batch(ROWS, MASKS)), expected)
    require(not moves_the_next(language_model), "flat rows that see each other")
    return "flat" if allowed.attention else "flat, masked"


def moves_the_next(language_model: LanguageModel) -> bool:
    """Whether another first sequence of a flat row changes the loss of the others."""
    masks = [[False] * len(MASKS[0]), *MASKS[1:]]
    with torch.no_grad():
        before, after = (
            language_model(flat_batch([first, *ROWS[1:]], masks)).sum()
            for first in (ROWS[0], [9, *ROWS[0][:0:-1]])
        )
    return abs(float(after / before) - 1) > 1e-5


def all_linear(subject: Subject) -> str:
    """The branch of every projection starts at zero and gets a gradient, and the loss falls; what
    training does not reach is left out."""
    base = subject.base()
    expected = base(input_ids=IDS, use_cache=False).logits
    for_text = {name for name, _ in base.named_modules()} - {*projections_outside_text(base)}
    config = AdapterConfig(r=4, experts=subject.has_experts)
    language_model = LanguageModel(adapters.build(base, config), base)
    check_close(base.eval()(input_ids=IDS, use_cache=False).logits, expected, "logits at the start")
    choose_layout(language_model)
    check_learns(language_model)
    left_out = linear_names(
        (name, module)
        for name, module in base.named_modules()
        if name in for_text and module is not base.get_output_embeddings()
    )
    return f"all but {', '.join(left_out)}" if left_out else ALL


def experts(subject: Subject) -> str:
    """The setting that adapts them."""
    base = subject.base()
    if not expert_names(base):
        has_modules = any(EXPERT.search(name) for name, _ in base.named_modules())
        return "`all-linear`" if has_modules else NO_EXPERTS
    try:
        adapters.build(base, AdapterConfig(r=4, target_modules=[], experts=True))
    except UserError:
        return "not by transformers' interface"
    return BY_PARAMETER


def loads(subject: Subject) -> None:
    """A saved adapter gives the same logits on a fresh base, by `cera-train` and by PEFT."""
    model = subject.padded().model
    expected = model(input_ids=IDS, use_cache=False).logits
    folder = subject.folder / "adapter"
    saved.save(model, trainable_weights(model), folder)
    for attach in (saved.attach, peft.PeftModel.from_pretrained):
        again = attach(subject.base(), folder).eval()
        logits = again(input_ids=IDS, use_cache=False).logits
        check_close(logits, expected, "logits")


def four_bits(subject: Subject) -> None:
    """The same as all-linear, over NF4 weights."""
    base = load_model(
        ModelConfig(subject.path, dtype=Dtype.float32, quantization=Quantization.nf4), CPU
    )
    language_model = LanguageModel(adapters.build(base, AdapterConfig(r=4)), base)
    choose_layout(language_model)
    check_learns(language_model)


def compiled(subject: Subject) -> None:
    """Compiled layers give the same loss and gradients."""
    language_model = subject.adapted()
    expected = loss_and_gradients(language_model)
    compile_layers(language_model, backend="eager")
    check_close(loss_and_gradients(language_model), expected)


def checkpointed(subject: Subject) -> None:
    """Gradient checkpointing gives the same loss and gradients."""
    language_model = subject.adapted()
    expected = loss_and_gradients(language_model.train())
    base = subject.base()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    language_model = subject.adapted(base).train()
    check_close(loss_and_gradients(language_model), expected)


def resumed(subject: Subject) -> None:
    """A run that was cut ends with the same bytes."""
    words = [
        *subject.words(),
        "train.compile=false",
        "data.eval_rows=4",
        "data.max_length=128",
        "train.max_updates=4",
        "train.save_every=2",
        "train.keep=2",
        "train.eval_every=4",
        "train.batch_size=2",
        f"output_dir={subject.folder}",
    ]
    train(compose(*words, "name=whole"))
    check_resume(subject.folder / "whole", compose(*words, "name=cut"))


def planned(subject: Subject) -> None:
    """`cera-plan` finds the parameters and the rows from config.json alone."""
    run = DryRun(compose(*subject.words(), "plan.gpu=cpu", command="plan"))
    language_model = subject.adapted()
    counts = adapters.parameter_counts(language_model.model)
    require((run.trainable, run.total) == counts, "other parameters")
    require(run.language_model.is_flat == language_model.is_flat, "other rows")


def generates(subject: Subject) -> None:
    """Tokens are the same with a cache and without."""
    with subject.adapted().generating() as model:
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        settings |= {"pad_token_id": 1, "attention_mask": torch.ones_like(IDS)}
        tokens = model.generate(input_ids=IDS, use_cache=True, **settings)
        logits = model(input_ids=tokens, use_cache=False).logits
    expected = logits[:, :-1].argmax(-1)
    count = IDS.shape[1]
    require(torch.equal(tokens[:, count:], expected[:, count - 1 :]), "other tokens")


VARYING = {
    "rows": rows,
    "all-linear": all_linear,
    "experts": experts,
}
PASSING = {
    "loads": loads,
    "4-bit": four_bits,
    "checkpointed": checkpointed,
    "resumed": resumed,
    "planned": planned,
    "generates": generates,
    "compiled": compiled,
}
CHECKS = VARYING | PASSING


# --- the sweep ------------------------------------------------------------------------------------


def built(subject: Subject) -> None:
    """There is a model to train."""
    subject.adapted()


def cell(model_type: str, check: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return cells.cell((CHECKS | {BUILT: built})[check], Subject(model_type, Path(folder)))


def cell_apart(model_type: str, check: str) -> str:
    """Runs a check in a process with a time limit: some types hang or crash."""
    apart = pebble.concurrent.process(timeout=SECONDS, mp_context=get_context("fork"))
    try:
        return apart(cell)(model_type, check).result()
    except TimeoutError:
        return f"over {SECONDS} s"
    except pebble.ProcessExpired:
        return "crashes"


# --- the page -------------------------------------------------------------------------------------


def failing(row: dict[str, str]) -> list[str]:
    return [name for name in PASSING if row.get(name, YES) != YES]


def cell_of(row: dict[str, str]) -> str:
    """The words of the page on a type: how its rows stand, what most types do not have, and the
    checks that fail."""
    if row[BUILT] != YES:
        return in_short(row[BUILT], WIDTH)
    varying = {name: in_short(row[name], WIDTH) for name in VARYING if row[name] not in USUAL}
    parts = [text if name == "rows" else f"{name}: {text}" for name, text in varying.items()]
    if failing(row):
        parts.append(f"fails: {', '.join(failing(row))}")
    return "; ".join(parts)


def table_of(found: Cells) -> str:
    return table({model_type: [cell_of(found[model_type])] for model_type in sorted(found)})


def page(found: Cells) -> str:
    trained = {model_type: row for model_type, row in found.items() if row[BUILT] == YES}
    refused = {model_type: row for model_type, row in found.items() if row[BUILT] != YES}
    without_failure = sum(not failing(row) for row in trained.values())
    compiled = sum("compiled" in row for row in trained.values())
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    return f"""# Architectures

    cera-train 'data.train_files=[rows.jsonl]' model.path=my/model name=mine

trains {len(trained)} of the {len(found)} causal types of transformers. In {without_failure}
no check fails.

| model types | rows, and exceptions |
|---|---|
{table_of(trained)}

Where no exception stands, every projection gets a branch, and the type has no experts.

{meanings(CHECKS)}

Models that also take images or sound train on text: vision towers get no branches. A type without
a causal class, such as Mistral 3, is loaded whole.

`make architectures` writes this page: it checks a tiny random model of each type, on a CPU without
fused kernels, with {packages}. torch.compile was tried on {compiled}.

## Not trained

| model types | reason |
|---|---|
{table_of(refused)}
"""


def main() -> None:
    cell("llama", "rows")  # what the first model of a process pays for, once for all
    gc.collect()
    gc.freeze()
    found = fill(FOUND, MODEL_TYPES, (BUILT, *CHECKS), cell_apart)
    PAGE.write_text(page(found))
    print(f"{PAGE}: {len(found)} types")


if __name__ == "__main__":
    main()
