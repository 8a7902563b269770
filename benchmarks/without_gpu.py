"""Memory of an update of every recipe on a fake GPU, beside what cera-plan predicts.

    python -m benchmarks.without_gpu                a table of all recipes, in two minutes python -m
    benchmarks.without_gpu math_r64 train.micro_batch_tokens=8192 python -m benchmarks.without_gpu
    math_r64 model=llama3_1_70b distributed.strategy=fsdp plan.gpus=8

The updates are the program's: its build, adapter, loss and optimizer. What comes from the
Hub is not there: the base has the shapes of its config.json, and the rows are as many and as long
as cera-plan takes them to be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from benchmarks.fake_gpu import fake_gpu
from cera_train.cli.compose import compose
from cera_train.common.files import config_dir
from cera_train.common.settings import to_plain
from cera_train.common.signals import Interruption
from cera_train.common.terminal import print_table
from cera_train.data.prepare import Example, TokenizedData, TokenizedRows, table_of
from cera_train.model import folder as model_files
from cera_train.planning.dry_run import architecture_of, quantised_linears
from cera_train.planning.make import make_plan
from cera_train.planning.plan import GB, RunPlan
from cera_train.runs.folder import RunFolder
from cera_train.settings.model import Quantization
from cera_train.settings.run import Config
from cera_train.training import build as builder
from cera_train.training import log as training_log
from cera_train.training.log import open_log
from cera_train.training.resolve import resolve
from cera_train.training.train import build_parts, update

UPDATES = 2
"""The first makes the optimizer's state, so the second needs the most memory."""


@dataclass(frozen=True)
class Tracked:
    """A recipe's updates on a fake GPU."""

    recipe: str
    plan: RunPlan
    bytes: int
    """The most that was allocated at once."""
    micro_batches: int
    """Of an update."""
    attention: str
    waits: int
    """How often the last update's CPU waited for the GPU."""

    @property
    def planned(self) -> float:
        """Bytes, by cera-plan."""
        return sum(self.plan.memory.values())

    @property
    def difference(self) -> float:
        """cera-plan's prediction over what was tracked, less 1."""
        return self.planned / self.bytes - 1


def recipes() -> list[str]:
    names = {file.stem for file in config_dir("recipes").glob("*.yaml")}
    # All but those whose updates need real values or rows.
    return sorted(names - {"dpo", "grpo_gsm8k", "grpo_dates", "sft"})


def track(recipe: str, layers: int | None = None, *overrides: str) -> Tracked:
    """Plans a recipe and runs two of its updates.

    Args:
        layers: of the base; None: all.
        overrides: settings that differ from the recipe's, as on a command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        architecture = architecture_of(
            compose(f"+recipe={recipe}", *overrides, command="plan").model
        )
        architecture.num_hidden_layers = layers or architecture.num_hidden_layers
        architecture.save_pretrained(folder)
        # Coverage is proven by gradients that are not zero, and a fake one has no numbers.
        settings = [
            f"+recipe={recipe}",
            *overrides,
            f"model.path={folder}",
            "train.check_coverage=false",
        ]
        settings.append("train.compile=false")  # no compiler takes a fake device
        settings += [
            "train.tasks=[]",
            "train.tasks_every=null",
            "train.task_settings=null",
            "train.samples=0",
        ]
        plan = make_plan(compose(*settings, command="plan"))
        settings = [setting for setting in settings if not setting.startswith("plan.")]
        config = compose(*settings, f"output_dir={folder}/outputs")
        rows = rows_of(plan)
        with fake_gpu(processes=plan.config.plan.gpus) as gpu, run_of(config, rows) as run:
            config, data, model, objective, progress, log = run
            gpu.reset_peak()
            for _ in range(UPDATES):
                gpu.waits = 0
                update(config, data, model, objective, progress, log, Interruption())
            batches = model.micro_batches(data.rows.train)
            passes = batches.passes(data.order.sequences(0), 1, 0, in_step=False)
            attention = model.language_model.attention
            return Tracked(recipe, plan, gpu.peak, len(passes), attention, gpu.waits)


def track_by_layers(recipe: str, *overrides: str) -> Tracked:
    """The same for all layers of the base, by what one more adds to the first few."""
    plan = make_plan(compose(f"+recipe={recipe}", *overrides, command="plan"))
    # With fewer sharded layers, the peak would lie outside the layers.
    few = 2 if plan.config.plan.gpus == 1 else 12
    some, more = (track(recipe, layers, *overrides) for layers in (few, few + 1))
    layers = architecture_of(plan.config.model).num_hidden_layers
    size = some.bytes + (layers - few) * (more.bytes - some.bytes)
    return replace(some, plan=plan, bytes=size)


def rows_of(plan: RunPlan) -> TokenizedRows:
    """Rows of one length, for all updates, that fill a micro-batch as the planned one is filled."""
    largest = plan.micro_batch
    train = plan.config.train
    at_once = min(largest.rows, math.ceil(train.batch_size / plan.config.plan.gpus))
    length = min(largest.tokens, train.micro_batch_tokens) // at_once
    supervised = max(1, min(length - 1, round(length * largest.supervised)))
    example = Example([0] * length, [False] * (length - supervised) + [True] * supervised)
    return TokenizedRows(table_of([example] * (UPDATES * train.batch_size)))


# --- what a machine without weights, rows and a GPU lacks -----------------------------------------


@contextlib.contextmanager
def run_of(config: Config, rows: TokenizedRows) -> Iterator[tuple]:
    """Config, data, model, objective, progress and log of a run with these rows, whose base has no
    numbers."""
    data = TokenizedData(rows, rows)
    replaced = [
        (builder, "load_tokenizer", lambda model: None),
        (builder, "prepare_data", lambda data_config, tokenizer, asks: data),
        (training_log, "tokenizer_digests", lambda tokenizer: {}),
        (model_files, "check_model", lambda path: None),
        (AutoModelForCausalLM, "from_pretrained", random_base),
        # The fake device has no generator to save.
        (torch.random, "fork_rng", lambda **_: contextlib.nullcontext()),
        (bitsandbytes.functional, "get_paged", paged),
        (bitsandbytes.functional, "fill", lambda tensor, value: None),
        (bitsandbytes.functional, "prefetch_tensor", lambda tensor: None),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        path = Path(config.output_dir) / config.name
        resolved = resolve(config, path)
        config = resolved.config
        folder = stack.enter_context(RunFolder.open(path, to_plain(config)))
        data, model, progress, _, objective = build_parts(config, folder)
        log = stack.enter_context(open_log(resolved, folder, data, model, progress))
        model.wrapped.train()
        yield config, data, model, objective, progress, log


def random_base(path: str, **settings: Any) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """AutoModelForCausalLM.from_pretrained for a folder that has a config.json alone."""
    quantization = settings["quantization_config"]
    with torch.device("cuda"):  # also where it will be sharded: only the updates count
        base = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path),
            dtype=settings["dtype"],
            attn_implementation=settings["attn_implementation"],
        )
    if quantization is not None:
        quantise(base, quantization)
    return base, {"missing_keys": []}


def quantise(base: PreTrainedModel, settings: Any) -> None:
    """NF4 by bitsandbytes' operations, which have shapes for fake tensors. Its class of weights
    does not take them."""
    linears = quantised_linears(base, Quantization.nf4)
    names = {module: name for name, module in base.named_modules()}
    whole = {names[linear]: linear.weight.detach() for linear in linears}
    skipped = [
        names[module]
        for module in names
        if isinstance(module, nn.Linear) and module not in set(linears)
    ]
    replace_with_bnb_linear(base, skipped, settings)
    for name, weight in whole.items():
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight,
            quant_type=settings.bnb_4bit_quant_type,
            compress_statistics=settings.bnb_4bit_use_double_quant,
        )
        linear = base.get_submodule(name)
        linear.weight = nn.Parameter(packed, requires_grad=False)
        linear.weight.quant_state = state
    base.is_loaded_in_4bit = True


def paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """bitsandbytes' paged memory: managed by CUDA, outside torch's allocator, and for torch on the
    CPU."""
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.is_paged = True
    tensor.page_deviceid = device.index
    return tensor


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", nargs="*", help="names; none: all. Values of settings, key=value, hold for all"
    )
    arguments = parser.parse_args().recipe
    overrides = [argument for argument in arguments if "=" in argument]
    rows = []
    for recipe in [name for name in arguments if name not in overrides] or recipes():
        tracked = track_by_layers(recipe, *overrides)
        sizes = [f"{size / GB:.2f} GB" for size in (tracked.planned, tracked.bytes)]
        rows.append([recipe, *sizes, f"{tracked.difference:+.1%}"])
    print_table(["recipe", "planned", "tracked", "difference"], rows, right=(1, 2, 3))


if __name__ == "__main__":
    main()
