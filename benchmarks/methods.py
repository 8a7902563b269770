"""`make methods`: trains every method of the installed PEFT, its variants and starts, and ours, on
a tiny random model, and writes docs/methods.md.

    python -m benchmarks.methods [NAME ...]

What is known so far is in outputs/methods/cells.json: a second call goes on from there. With names
it runs these anew, and leaves the page as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tiny_models import byte_tokenizer
from cera_train.adapters.methods import usable_methods
from cera_train.adapters.saved import attach, is_adapter, keeps_base
from cera_train.cli.compose import compose
from cera_train.common.errors import UserError
from cera_train.common.files import options
from cera_train.planning.planner import make_plan
from cera_train.runs.subject import find_subject
from cera_train.serving.export import export_run
from cera_train.settings.adapters import Activation, DropoutOn, Init, Mix
from cera_train.training.build import build_data
from cera_train.training.train import train as train_run

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
WORK = ROOT / "outputs" / "methods"
YES = "yes"

COLUMNS = {
    "trains": "every adapted module gets a gradient, and the loss falls",
    "resumes": "a run that was cut ends with the same bytes",
    "processes": "two processes have the losses of one, to 1e-6",
    "plan": "`cera-plan` counts the parameters from config.json alone",
    "4-bit": "the same as *trains*, over NF4 on a CPU",
    "loads": "the saved adapter has the same losses on a fresh base, by `cera-train` and by PEFT",
    "base": "the base comes back where the adapter is switched off",
    "merges": "PEFT merges it, to 1e-4 nats a token; of CeRA, `cera-export` makes a LoRA",
}

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
    if path.exists():
        return path
    tokenizer = byte_tokenizer("</s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(path)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def make_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"{n} and {n * n}:", "completion": f" {n * 7} or {n + 5}"} for n in range(18)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


class Failed(Exception):
    """A check that did not hold, in a few words."""


def check(holds: bool, reason: str) -> None:
    if not holds:
        raise Failed(reason)


def figures(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def train(case: Case, folder: Path, *words: str) -> Path:
    """Trains a case; returns the run's folder."""

    config = compose(*words_of_case(case, folder, *words))
    path = folder / config.name
    if (path / "result.json").exists():
        shutil.rmtree(path)
    with contextlib.redirect_stdout(io.StringIO()):
        train_run(config)
    return path


def trains(case: Case, folder: Path) -> None:
    check_falls(train(case, folder, "name=one"))


def check_falls(run: Path) -> None:
    """Some update has a lower loss than the first: PVeRA's are noisy."""
    first, *later = figures(run, "train/loss")
    check(min(later) < first, f"the loss went from {first:.4f} to {later[-1]:.4f}")


def resumes(case: Case, folder: Path) -> None:
    cut = folder / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(folder / "one", cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "4")

    with contextlib.redirect_stdout(io.StringIO()):
        train_run(compose(*words_of_case(case, folder, "name=cut")))
    for path in sorted((folder / "one" / "adapter").glob("*.safetensors")):
        same = path.read_bytes() == (cut / "adapter" / path.name).read_bytes()
        check(same, f"{path.name} differs")


def plans(case: Case, folder: Path) -> None:

    config = compose(*words_of_case(case, folder), "plan.gpu=cpu", command="plan")
    plan = make_plan(config)
    counted = json.loads((folder / "one" / "result.json").read_text())["trainable_parameters"]
    check(plan.trainable == counted, f"{plan.trainable} planned, {counted} trained")


def trains_over_4_bits(case: Case, folder: Path) -> None:
    nf4 = "model.quantization=nf4"
    run = train(case, folder, "name=nf4", nf4)
    check_falls(run)
    base = WORK / f"{case.base}_nf4"
    if not base.exists():
        plain = Case("", ("adapter=cera",), case.base)
        shutil.copytree(train(plain, folder, "name=nf4_base", nf4), base)
    moved = held_out_losses(folder / "one", "before") - losses_of(load_base(case, folder), folder)
    if moved.abs().max() < 1e-4:  # then it starts as the base does over 4 bits too
        off = (held_out_losses(run, "before") - held_out_losses(base, "before")).abs().max()
        check(off < 1e-3, f"starts up to {off:.1g} nats off the base")


def loads(case: Case, folder: Path) -> None:

    run = folder / "one"
    expected = held_out_losses(run)
    check_close(losses_of(attach(load_base(case, folder), run / "adapter"), folder), expected)
    if (run / "adapter" / "adapter_config.json").exists():
        model = peft.PeftModel.from_pretrained(load_base(case, folder), run / "adapter")
        try:
            check_close(losses_of(model, folder), expected)
        except Failed as error:
            raise Failed(f"PEFT alone: {error}") from None


def base_comes_back(case: Case, folder: Path) -> None:

    model = attach(load_base(case, folder), folder / "one" / "adapter")
    check(is_adapter(model), "trains the base")
    expected = losses_of(load_base(case, folder), folder)
    with model.disable_adapter():
        is_base = (losses_of(model, folder) - expected).abs().max() < 1e-4
    check(is_base == keeps_base(model), f"keeps_base says {keeps_base(model)}")
    check(is_base, "moves a part of W0 into the adapter")


def merges(case: Case, folder: Path) -> None:

    run = folder / "one"
    model = attach(load_base(case, folder), run / "adapter")
    check(is_adapter(model), "is the model itself")
    if model.peft_config["default"].peft_type == "CERA":
        export(run)
        return
    expected = losses_of(model, folder)
    merged = model.merge_and_unload()
    check_close(losses_of(merged, folder), expected, 1e-4)


def export(run: Path) -> None:

    config = compose(f"run={run}", "at_most=9", command="export")
    with contextlib.redirect_stdout(io.StringIO()):
        export_run(config, find_subject(config))


def load_base(case: Case, folder: Path) -> Any:

    base = AutoModelForCausalLM.from_pretrained(make_base(folder, case.base), dtype=torch.float32)
    return base.requires_grad_(False).eval()


def losses_of(model: Any, folder: Path) -> Any:
    """The losses of the held-out tokens, a row at a time, by transformers alone."""

    losses = []
    for row in json.loads((folder / "held_out.json").read_text()):
        ids = torch.tensor([row["ids"]])
        is_supervised = torch.tensor(row["mask"][1:])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1]
        wanted = ids[0, 1:]
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        losses.append(loss[is_supervised])
    return torch.cat(losses)


def held_out_losses(run: Path, when: str = "after") -> Any:

    return load_file(run / f"losses_{when}.safetensors")["losses"]


def write_held_out(folder: Path) -> None:
    """The held-out rows as the runs read them."""

    rows = build_data(compose(*words_of_case(Case("", ()), folder))).rows.evaluation
    written = [
        {
            "ids": rows.tokens("input_ids", row).to_pylist(),
            "mask": rows.tokens("loss_mask", row).to_pylist(),
        }
        for row in range(len(rows))
    ]
    (folder / "held_out.json").write_text(json.dumps(written))


def check_close(losses: Any, expected: Any, tolerance: float = 1e-5) -> None:
    difference = (losses - expected).abs().max().item()
    check(difference <= tolerance, f"losses differ by {difference:.2g}")


CHECKS: dict[str, Callable[[Case, Path], None]] = {
    "trains": trains,
    "resumes": resumes,
    "plan": plans,
    "4-bit": trains_over_4_bits,
    "loads": loads,
    "base": base_comes_back,
    "merges": merges,
}


def cell(column: str, case: Case, folder: Path) -> str:
    """yes, or why not. Whatever a method raises is an answer."""
    try:
        CHECKS[column](case, folder)
    except Exception as error:
        return reason_of(error)
    return YES


def reason_of(error: Exception) -> str:
    """An error without the settings and the folder that it is about."""
    text = " ".join(str(error).split()).replace(str(WORK), "").replace(str(ROOT), "")
    value = r"(=(\{.*?\}|\S+?))?"
    place = rf"^(adapter\.(method|kind)=\S+?)?( ?adapter\.settings\.\w+{value})*:? (?=\S)"
    is_plain = isinstance(error, UserError | Failed)
    text = re.sub(place, "", text)
    return text if is_plain else f"{type(error).__name__}: {text}"


def in_short(reason: str) -> str:
    """What is so, without how to fix it."""
    sentence = re.split(r"\. |[:.,] (?:[Cc]hoose|[Ss]et|Leave|save) ", reason)[0].rstrip(".")
    return textwrap.shorten(sentence, 90, placeholder=" ...").replace("|", "/")


# --- two processes --------------------------------------------------------------------------------


def compare_processes(cases: list[Case], folder: Path) -> Iterator[tuple[Case, str]]:
    """All cases in one launch of two processes."""
    (folder / "cases.json").write_text(json.dumps([dataclasses.astuple(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.methods", "--in-processes", str(folder)]
    with (folder / "processes.log").open("w") as log:
        subprocess.run(command, check=False, cwd=ROOT, stdout=log, stderr=log)
    for case in cases:
        yield case, compared(folder / slug(case))


def compared(folder: Path) -> str:
    problem = folder / "two.txt"
    if problem.exists():
        return problem.read_text()
    if not (folder / "two" / "result.json").exists():
        return "the processes end"
    worst = max(
        abs(two - one) / max(1, abs(one))
        for name in ("train/loss", "eval/loss")
        for one, two in zip(
            figures(folder / "one", name), figures(folder / "two", name), strict=True
        )
    )
    return YES if worst <= 1e-6 else f"losses differ by {worst:.1g}"


def train_in_processes(folder: Path) -> None:
    """What each process of `compare_processes` runs."""
    for fields in json.loads((folder / "cases.json").read_text()):
        case = Case(fields[0], tuple(fields[1]), fields[2])
        place = folder / slug(case)
        print(case.name, flush=True)
        try:
            train(case, place, "name=two")
        except Exception as error:
            (place / "two.txt").write_text(reason_of(error))


def slug(case: Case) -> str:
    return re.sub(r"\W+", "_", case.name)


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


def ungrouped(text: str) -> list[str]:
    """The cases that `grouped` has written."""
    names = []
    for method, word, variants in re.findall(r"([^ ,(]+)(?: \((also|with) ([^)]+)\))?", text):
        if word != "with":
            names.append(method)
        if variants:
            names += [f"{method} {variant}" for variant in variants.split(", ")]
    return names


def page(cells: dict[str, dict[str, str]]) -> str:
    """Methods that do everything in one paragraph, and each exception with its methods."""
    whole = [name for name, row in cells.items() if set(row.values()) == {YES}]
    refused = [name for name, row in cells.items() if row["trains"] != YES]
    exceptions: dict[str, dict[str, list[str]]] = {column: {} for column in COLUMNS}
    for name, row in cells.items():
        for column, text in row.items():
            if text != YES:
                exceptions[column].setdefault(in_short(text), []).append(name)
    meanings = "\n".join(f"- **{name}**: {meaning}." for name, meaning in COLUMNS.items())
    sections = "\n\n".join(
        f"### Fails: {column}\n\n"
        + "\n".join(f"- {grouped(names)}: {reason}" for reason, names in reasons.items())
        for column, reasons in exceptions.items()
        if reasons
    )
    versions = f"PEFT {version('peft')} and transformers {version('transformers')}"
    return f"""# Methods

    cera-train +recipe=logistic_map adapter=peft adapter.method=MISS name=miss

trains a method of PEFT. Of {len(cells)} methods and variants, {len(whole)} do all of this.
{len(cells) - len(whole) - len(refused)} do most of it, and {len(refused)} are refused in one line.

{meanings}

## All

{grouped(whole)}

`make methods` writes this page: it trains every type of the installed PEFT, each switch and choice
of its config, each start of LoRA, and ours, on a tiny random Llama on a CPU, with {versions}.

## Exceptions

What does not train was not tried further.

{sections}
"""


def measure_case(case: Case, folder: Path) -> dict[str, str]:
    """The cells of one case, but for several processes; of one that does not train, only that."""
    write_held_out(folder)
    row = {"trains": cell("trains", case, folder)}
    if row["trains"] == YES:
        row |= {column: cell(column, case, folder) for column in CHECKS if column != "trains"}
    return row


def measure(names: list[str]) -> dict[str, dict[str, str]]:
    """The cells of all cases; those of these names anew."""
    WORK.mkdir(parents=True, exist_ok=True)
    known = WORK / "cells.json"
    cells = json.loads(known.read_text()) if known.exists() else {}
    cases = [*our_cases(), *peft_cases()]
    for case in cases:
        if case.name in names:
            cells.pop(case.name, None)

    def keep(case: Case, column: str, text: str) -> None:
        cells.setdefault(case.name, {})[column] = text
        known.write_text(json.dumps(cells, indent=1) + "\n")

    for case in cases:
        row = cells.get(case.name, {})
        folder = WORK / slug(case)
        if row.get("trains", YES) != YES or set(row) >= set(CHECKS):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for column, text in measure_case(case, folder).items():
            keep(case, column, text)
        print(f"{case.name}: {cells[case.name]}", flush=True)
    left = [
        case
        for case in cases
        if cells[case.name]["trains"] == YES and "processes" not in cells[case.name]
    ]
    if left:
        for case, text in compare_processes(left, WORK):
            keep(case, "processes", text)
    return {case.name: cells[case.name] for case in cases}


def main() -> int:
    if "--in-processes" in sys.argv:
        train_in_processes(Path(sys.argv[-1]))
        return 0
    names = sys.argv[1:]
    cells = measure(names)
    if not names:
        PAGE.write_text(page(cells))
        shutil.rmtree(WORK)
        print(f"{PAGE}: {len(cells)} methods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
