"""The model card of a run's adapter: what it is, how to load it, what it was trained on and what was measured.

It says only what the run's folder says, so it can be written again after every evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cera_train.adapters.config import AdapterConfig
from cera_train.common.errors import UserError
from cera_train.common.files import write_text
from cera_train.common.trust import check_links, clean
from cera_train.config import Config
from cera_train.data.config import Layout
from cera_train.evaluation.config import EvalConfig
from cera_train.model.config import ModelConfig
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import AccuracyResult, PerplexityResult, RunResult, read_evaluation_result
from cera_train.runs.subject import digest_of


def write_card(run: Path, result: RunResult) -> None:
    """Writes adapter/README.md from the config, the result and the evaluations of a run.

    Raises:
        UserError: a file of the run is broken, or its adapter's folder is a link that leads out of it.
    """
    check_links(run, [run / "adapter"])
    config = load_config(run / "config.yaml")
    evaluations = [
        read_evaluation_result(folder / "result.json")
        for folder in sorted(run.glob("eval/*"))
        if (folder / "result.json").is_file() and is_of_this(folder, run / "adapter", config)
    ]
    try:
        text = card(config, result, evaluations)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"a result.json of {run} is not as cera-train writes it: {error!r}. Restore it.") from error
    write_text(run / "adapter" / "README.md", text)


def is_of_this(evaluation: Path, adapter: Path, config: Config) -> bool:
    """Whether an evaluation is of this adapter on the run's base: not of the run's best one, nor over 4 bits."""
    settings = load_config(evaluation / "config.yaml", EvalConfig)
    return settings.adapter_digest == digest_of(adapter) and settings.model == config.model


def card(config: Config, result: RunResult, evaluations: list[AccuracyResult | PerplexityResult]) -> str:
    """The card's text, with the metadata that the Hub reads."""
    adapter, license_name = config.adapter, license_of(config.model)
    is_full, is_cera = adapter.family.trains_base, adapter.kind == "cera"
    license_text = (
        f"The base weights are under `{escape(license_name)}`; an adapter of theirs comes under its terms."
        if license_name
        else "The licence of the base weights is not on record here: see where they come from."
    )
    formula = f"y = W0 x + s B dropout({adapter.activation}(A x))"
    branch = f"\nIts branch is non-linear, `{formula}`, and stays beside W0.\n" if is_cera else ""
    registers = "import cera_train  # registers CeRA with PEFT\n" if is_cera else ""
    library, loader = ("transformers", "AutoModelForCausalLM") if is_full else ("peft", "AutoPeftModelForCausalLM")
    what = f"The base model after {adapter.title}" if is_full else f"A {adapter.title} adapter"
    return f"""---
{yaml.safe_dump(metadata(config, license_name), sort_keys=False)}---

# {escape(config.name)}

{escape(what)}, trained with cera-train.
{branch}
## How to load it

```python
{registers}from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("FOLDER")  # where this file lies
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## How it was trained

{table(trained(config, result))}

## What was measured

{table(measured(config, result, evaluations))}

## Licence

{license_text}
"""


def license_of(model: ModelConfig) -> str | None:
    """The licence of the base weights, where conf/model has it."""
    return model.facts.license if model.facts and model.facts.of == model.path else None


def metadata(config: Config, license_name: str | None) -> dict[str, Any]:
    """What the Hub reads."""
    model, data = config.model, config.data
    is_hub_id = not model.path.startswith("pypi:") and not Path(model.path).exists()
    fields = {
        "library_name": "transformers" if config.adapter.family.trains_base else "peft",
        "base_model": model.path if is_hub_id else None,
        "license": license_name,
        "datasets": [data.path] if data.path and not data.train_files else None,
        "tags": [config.adapter.kind.value],
        "pipeline_tag": "text-generation",
    }
    return {name: value for name, value in fields.items() if value}


def trained(config: Config, result: RunResult) -> dict[str, str]:
    model = config.model
    return {
        "Base model": model.path + (f", revision {model.revision}" if model.revision else ""),
        "Base weights": model.dtype.value if model.quantization == "none" else model.quantization.value,
        "Adapter": described(config.adapter),
        "Trainable parameters": f"{result.trainable_parameters:,}",
        "Data": data_of(config),
        "Training": f"{result.updates:,} updates of {config.train.batch_size} sequences, "
        f"{config.optimizer.kind.value}, learning rate {config.optimizer.lr:g}, seed {config.train.seed}",
    }


def measured(config: Config, result: RunResult, evaluations: list[AccuracyResult | PerplexityResult]) -> dict[str, str]:
    rows = {
        "Perplexity, untouched base": f"{result.perplexity_before:.3f}",
        "Perplexity": f"{result.perplexity:.3f}",
    }
    if result.spectrum.effective_rank_mean is not None:
        rows |= {
            "Effective rank, mean over modules": f"{result.spectrum.effective_rank_mean:.1f} of {config.adapter.r}",
            "Effective rank, largest": f"{result.spectrum.effective_rank_max:.1f} of {config.adapter.r}",
        }
    for evaluation in evaluations:
        rows |= evaluation_rows(evaluation)
    return rows


def described(adapter: AdapterConfig) -> str:
    """The method with its rank and targets."""
    rank = "" if adapter.r is None else f" of rank {adapter.r}"
    targets = adapter.target_modules
    if targets is None:
        return f"{adapter.title}{rank}"
    return f"{adapter.title}{rank} on {targets if isinstance(targets, str) else ', '.join(targets)}"


def data_of(config: Config) -> str:
    data = config.data
    if data.layout == Layout.logistic_map:
        return f"the logistic map x' = {data.logistic_map.growth:g} x (1 - x)"
    if data.train_files:
        return ", ".join(Path(name).name for name in data.train_files)
    return f"{data.path}{f' ({data.subset})' if data.subset else ''}, {data.train_split}"


def evaluation_rows(result: AccuracyResult | PerplexityResult) -> dict[str, str]:
    """One evaluation in the card's table."""
    if isinstance(result, PerplexityResult):
        return {f"{result.task}, perplexity": f"{result.perplexity:.3f}"}
    rows = {}
    for grader in ("exact", "verified"):
        if (accuracy := result.accuracy(grader)) is not None:
            lower, upper = result.interval(accuracy)
            rows[f"{result.task}, {grader} pass@1"] = (
                f"{accuracy.value:.1%} (95 % interval {lower:.1%} to {upper:.1%}, {result.problems:,} problems)"
            )
    return rows


def table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {escape(name)} | {escape(value)} |" for name, value in rows.items())])


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = clean(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|#$~":
        text = text.replace(mark, f"\\{mark}")
    return text
