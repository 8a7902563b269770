"""`make methods`: trains every method of the installed PEFT, its variants and starts, and ours, on
a tiny random model, and writes docs/methods.md.

Cells are kept in outputs/methods/cells.json as they come: a second call goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import typing
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
)
from benchmarks.rows import completion_losses, write_rows
from benchmarks.tiny_models import SIZES, save_random
from cera_train.adapters.methods import usable_methods
from cera_train.adapters.saved import attach, is_adapter, keeps_base
from cera_train.cli.compose import compose
from cera_train.common.files import options
from cera_train.distributed.processes import in_processes
from cera_train.planning.plan import make_plan
from cera_train.runs.results import LOSSES_AFTER, LOSSES_BEFORE, METRICS, read_metrics
from cera_train.serving.export import export_run
from cera_train.settings.adapters import Activation, DropoutOn, Init, Mix
from cera_train.training.build import build_data
from cera_train.training.train import train as train_run

PAGE = ROOT / "docs" / "methods.md"
WORK = ROOT / "outputs" / "methods"
WIDTH = 90

NEEDS = {
    "RANDLORA": {"randlora_alpha": 80},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [17, 18, 19]},
    "ADAMSS": {"num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "OFT": {"oft_block_size": 0},
    "FOURIERFT": {"n_frequency": 16},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 16},
    "LORA alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "LORA use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}},
    "LORA init_lora_weights=loftq": {"loftq_config": {"loftq_bits": 4}},
    "LORA arrow_config": {"arrow_config": {"top_k": 1}},
    "LORA velora_config": {"velora_config": {"num_groups": 8}},
}
"""Settings without which a method, or a variant of it, does not fit a model 32 wide, or has no
meaning."""

PLACES = ("IA3", "LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW")
"""Methods that choose their modules themselves."""

NO_VARIANTS = re.compile(r"bias|fan_in_fan_out|progressbar|use_effective_conv2d")
"""Settings that name what the base has, or what is printed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with the words of its command line."""

    name: str
    words: tuple[str, ...]
    base: str = "llama"


PLAIN = Case("", ("adapter=cera",))

# --- every method ---------------------------------------------------------------------------------


def peft_cases() -> Iterator[Case]:
    """Every type of the installed PEFT, as it stands and with each of its variants. A type that is
    refused has no variants."""
    for kind in sorted(set(peft.PeftType), key=str):
        if kind.value == "CERA":
            continue
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        has_rank = any(field.name == "r" for field in dataclasses.fields(config_class))
        yield peft_case(kind.value, has_rank, {})
        if kind.value in usable_methods():
            for name, settings in variants(config_class).items():
                yield peft_case(f"{kind.value} {name}", has_rank, settings)


def peft_case(name: str, has_rank: bool, settings: dict[str, Any]) -> Case:
    method = name.partition(" ")[0]
    settings = NEEDS.get(method, {}) | settings | NEEDS.get(name, {})
    words = ["adapter=peft", f"adapter.method={method}"]
    if not has_rank:
        words.append("adapter.r=null")
    if method in PLACES:
        words.append("adapter.target_modules=null")
    if settings:
        words.append(f"adapter.settings={json.dumps(settings)}".replace('"', ""))
    return Case(name, tuple(words))


def variants(config_class: type) -> dict[str, dict[str, Any]]:
    """Name -> settings of each variant: a switch the other way, another word of a choice, a start
    or a variant of LoRA with a config of its own."""
    general = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    hints = typing.get_type_hints(config_class)
    found: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(config_class):
        name = field.name
        if name in general or NO_VARIANTS.fullmatch(name):
            continue
        choices = [word for word in words_of(hints[name]) if word != field.default]
        start = name.removesuffix("_config")
        if start != name and hasattr(LoraLayer, f"{start}_init"):
            choices = [start]
            name = "init_lora_weights"
        for word in choices:
            word = word.replace("[number of iters]", "4")
            found[f"{name}={word}"] = {name: word}
        if isinstance(field.default, bool) and not choices and not name.startswith("init"):
            found[f"{name}={str(not field.default).lower()}"] = {name: not field.default}
        if field.metadata.get("is_lora_variant") and not isinstance(field.default, bool):
            found[name] = {name: {}}
    return found


def words_of(annotation: Any) -> list[str]:
    """The strings of a Literal, also inside a union."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [word for word in arguments if isinstance(word, str)]
    return [word for argument in arguments for word in words_of(argument)]


def our_cases() -> Iterator[Case]:
    """What conf/adapter has, CeRA's variants, and its experts."""
    changed = {"dense": ("adapter.r=null",), "full": ("adapter.r=null",)}
    changed["randlora"] = ("adapter.alpha=80",)
    for name in options("adapter"):
        if name != "peft":
            yield Case(f"adapter={name}", (f"adapter={name}", *changed.get(name, ())))
    choices = {"activation": Activation, "init": Init, "dropout_on": DropoutOn, "mix": Mix}
    for setting, words in choices.items():
        for word in [*words][1:]:
            yield Case(f"cera {setting}={word}", ("adapter=cera", f"adapter.{setting}={word}"))
    yield Case("cera experts=true", ("adapter=cera", "adapter.experts=true"), "qwen3_moe")


# --- a case ---------------------------------------------------------------------------------------


def make_base(folder: Path, kind: str) -> Path:
    """A random model of two layers, 32 wide, with a tokenizer of letters."""
    path = folder / kind
    if not path.exists():
        save_random(
            path,
            kind,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            **SIZES,
        )
    return path


def make_rows(folder: Path) -> Path:
    rows = [
        {"prompt": f"{n} and {n * n}:", "completion": f" {n * 7} or {n + 5}"} for n in range(18)
    ]
    return write_rows(folder / "rows.jsonl", rows)


def words_of_case(case: Case, folder: Path, *words: str) -> list[str]:
    """The command line of a case: four updates on the same sixteen rows. Adam's eps is so large
    that rounding does not decide the sign of a step."""
    return [
        f"model.path={make_base(folder, case.base)}",
        f"data.train_files=[{make_rows(folder)}]",
        "data.eval_rows=2",
        "data.max_length=64",
        "model.dtype=float32",
        "adapter.r=4",
        "adapter.alpha=null",
        *case.words,
        "optimizer.lr=1e-2",
        "optimizer.warmup_ratio=0",
        "optimizer.eps=1e-4",
        "train.batch_size=16",
        "train.max_updates=4",
        "train.eval_every=4",
        "train.save_every=2",
        "train.keep=9",
        "train.compile=false",
        f"output_dir={folder}",
        *words,
    ]


def logged_losses(run: Path) -> list[float]:
    """Of the updates, and then of the evaluations."""
    metrics = read_metrics(run / METRICS)
    return [line.loss for line in (*metrics.updates, *metrics.evaluations)]


def train(case: Case, folder: Path, *words: str) -> Path:
    """Trains a case anew; returns the run's folder."""
    config = compose(*words_of_case(case, folder, *words))
    path = folder / config.name
    shutil.rmtree(path, ignore_errors=True)
    in_processes(train_run, config)
    return path


def load_base(case: Case, folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(make_base(folder, case.base), dtype=torch.float32)
    return base.requires_grad_(False).eval()


def losses_of(model: Any, folder: Path) -> torch.Tensor:
    """The losses of the held-out tokens, a row at a time, by transformers alone."""
    rows = build_data(compose(*words_of_case(PLAIN, folder))).rows.evaluation
    losses = []
    for row in range(len(rows)):
        ids = rows.tokens("input_ids", row).to_pylist()
        prompt = rows.tokens("loss_mask", row).to_pylist().index(True)
        losses.append(completion_losses(model.eval(), ids, prompt))
    return torch.cat(losses)


def held_out_losses(run: Path, file: str = LOSSES_AFTER) -> torch.Tensor:
    return load_file(run / file)["losses"]


def check_falls(run: Path) -> None:
    """Some update has a lower loss than the first: PVeRA's are noisy."""
    first, *later = [line.loss for line in read_metrics(run / METRICS).updates]
    require(min(later) < first, f"the loss went from {first:.4f} to {later[-1]:.4f}")


# --- the checks -----------------------------------------------------------------------------------


def trains(case: Case, folder: Path) -> None:
    """Every adapted module gets a gradient, and the loss falls."""
    check_falls(train(case, folder, "name=one"))


def resumes(case: Case, folder: Path) -> None:
    """A run that was cut ends with the same bytes."""
    check_resume(folder / "one", compose(*words_of_case(case, folder, "name=cut")))


def processes(case: Case, folder: Path) -> None:
    """Two processes have the losses of one, to 1e-6."""
    run = train(case, folder, "name=two", "launch.processes=2")
    losses = zip(logged_losses(folder / "one"), logged_losses(run), strict=True)
    worst = max(abs(two - one) / max(1, abs(one)) for one, two in losses)
    require(worst <= 1e-6, f"losses differ by {worst:.1g}")


def plans(case: Case, folder: Path) -> None:
    """`cera-plan` counts the parameters from config.json alone."""
    plan = make_plan(compose(*words_of_case(case, folder), "plan.gpu=cpu", command="plan"))
    counted = json.loads((folder / "one" / "result.json").read_text())["trainable_parameters"]
    require(plan.trainable == counted, f"{plan.trainable} planned, {counted} trained")


def trains_over_4_bits(case: Case, folder: Path) -> None:
    """The same as *trains*, over NF4 on a CPU."""
    nf4 = "model.quantization=nf4"
    run = train(case, folder, "name=nf4", nf4)
    check_falls(run)
    before = held_out_losses(folder / "one", LOSSES_BEFORE)
    moved = before - losses_of(load_base(case, folder), folder)
    if moved.abs().max() < 1e-4:  # then it starts as the base does over 4 bits too
        base = train(dataclasses.replace(PLAIN, base=case.base), folder, "name=nf4_base", nf4)
        start = held_out_losses(run, LOSSES_BEFORE)
        off = (start - held_out_losses(base, LOSSES_BEFORE)).abs().max()
        require(off < 1e-3, f"starts up to {off:.1g} nats off the base")


def loads(case: Case, folder: Path) -> None:
    """The saved adapter has the same losses on a fresh base, by `cera-train` and by PEFT."""
    run = folder / "one"
    expected = held_out_losses(run)
    ways = [attach]
    if (run / "adapter" / "adapter_config.json").exists():
        ways.append(peft.PeftModel.from_pretrained)
    for load in ways:
        model = load(load_base(case, folder), run / "adapter")
        check_close(losses_of(model, folder), expected, "losses", rtol=0, atol=1e-5)


def base_comes_back(case: Case, folder: Path) -> None:
    """The base comes back where the adapter is switched off."""
    model = attach(load_base(case, folder), folder / "one" / "adapter")
    require(is_adapter(model), "trains the base")
    expected = losses_of(load_base(case, folder), folder)
    with model.disable_adapter():
        is_base = (losses_of(model, folder) - expected).abs().max() < 1e-4
    require(is_base == keeps_base(model), f"keeps_base says {keeps_base(model)}")
    require(is_base, "moves a part of W0 into the adapter")


def merges(case: Case, folder: Path) -> None:
    """PEFT merges it, to 1e-4 nats a token; of CeRA, `cera-export` makes a LoRA."""
    run = folder / "one"
    model = attach(load_base(case, folder), run / "adapter")
    require(is_adapter(model), "is the model itself")
    if model.peft_config["default"].peft_type == "CERA":
        export_run(compose(f"run={run}", "at_most=9", command="export"))
        return
    expected = losses_of(model, folder)
    check_close(losses_of(model.merge_and_unload(), folder), expected, "losses", rtol=0)


CHECKS = {
    "trains": trains,
    "resumes": resumes,
    "processes": processes,
    "plan": plans,
    "4-bit": trains_over_4_bits,
    "loads": loads,
    "base": base_comes_back,
    "merges": merges,
}


def cell(case: Case, check: str) -> str:
    """Without the folders of this machine."""
    folder = WORK / re.sub(r"\W+", "_", case.name)
    text = cells.cell(CHECKS[check], case, folder)
    return text.replace(str(WORK), "").replace(str(ROOT), "")


# --- the page -------------------------------------------------------------------------------------


def grouped(names: list[str]) -> str:
    """The cases, with the variants of a method together: `OFT (also coft=true)` is OFT and OFT
    coft=true; `HRA (with apply_GS=true)` is the variant alone."""
    methods: dict[str, list[str]] = {}
    for name in names:
        method, _, variant = name.partition(" ")
        methods.setdefault(method, []).append(variant)
    texts = []
    for method, variants in methods.items():
        word = "also" if "" in variants else "with"
        listed = ", ".join(filter(None, variants))
        texts.append(f"{method} ({word} {listed})" if listed else method)
    return ", ".join(texts)


def page(found: Cells) -> str:
    """Methods that do everything in one paragraph, and each exception with its methods."""
    whole = [name for name, row in found.items() if set(row.values()) == {YES}]
    refused = [name for name, row in found.items() if row["trains"] != YES]
    exceptions: dict[str, dict[str, list[str]]] = {column: {} for column in CHECKS}
    for name, row in found.items():
        for column, text in row.items():
            if text != YES:
                exceptions[column].setdefault(in_short(text, WIDTH), []).append(name)
    sections = "\n\n".join(
        f"### Fails: {column}\n\n"
        + "\n".join(f"- {grouped(names)}: {reason}" for reason, names in reasons.items())
        for column, reasons in exceptions.items()
        if reasons
    )
    versions = f"PEFT {version('peft')} and transformers {version('transformers')}"
    return f"""# Methods

    cera-train +recipe=logistic_map adapter=peft adapter.method=MISS name=miss

trains a method of PEFT. Of {len(found)} methods and variants, {len(whole)} do all of this.
{len(found) - len(whole) - len(refused)} do most of it, and {len(refused)} are refused in one line.

{meanings(CHECKS)}

## All

{grouped(whole)}

`make methods` writes this page: it trains every type of the installed PEFT, each switch and choice
of its config, each start of LoRA, and ours, on a tiny random Llama on a CPU, with {versions}.

## Exceptions

What does not train was not tried further.

{sections}
"""


def main() -> None:
    cases = {case.name: case for case in [*our_cases(), *peft_cases()]}
    found = fill(
        WORK / "cells.json", cases, [*CHECKS], lambda name, check: cell(cases[name], check)
    )
    PAGE.write_text(page(found))
    shutil.rmtree(WORK)
    print(f"{PAGE}: {len(found)} methods")


if __name__ == "__main__":
    main()
