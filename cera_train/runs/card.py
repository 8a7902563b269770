"""The model card of a run's adapter. It holds what the run's folder holds, so it can be written again after every
evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cera_train.adapters.family import family, title
from cera_train.common.errors import UserError
from cera_train.common.files import write_text
from cera_train.common.trust import check_links, clean
from cera_train.runs.recorded_config import load_config
from cera_train.runs.results import AccuracyResult, PerplexityResult, RunResult, read_evaluation_result
from cera_train.runs.subject import digest_of
from cera_train.settings.data import DataConfig, Layout
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }}, trained with cera-train.
{{ branch }}
## How to load it

```python
{{ registers }}from {{ library_name }} import {{ loader }}
from transformers import AutoTokenizer

model = {{ loader }}.from_pretrained("FOLDER")  # where this file lies
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## How it was trained

{{ trained }}

## What was measured

{{ measured }}

## Licence

{{ terms }}
"""


def write_card(run: Path, result: RunResult) -> None:
    """Writes adapter/README.md from the config, the result and the evaluations of a run."""
    check_links(run, [run / "adapter"])
    config = load_config(run / "config.yaml")
    evaluations = []
    for path in sorted(run.glob("eval/*/result.json")):
        settings = load_config(path.with_name("config.yaml"), EvalConfig)
        # Not of the run's best adapter, nor over a base in 4 bits.
        if settings.adapter_digest == digest_of(run / "adapter") and settings.model == config.model:
            evaluations.append(read_evaluation_result(path))
    try:
        card = _card(config, result, evaluations)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"a result.json of {run} is not as cera-train writes it: {error!r}. Restore it.") from error
    write_text(run / "adapter" / "README.md", str(card))


def _card(config: Config, result: RunResult, evaluations: list[AccuracyResult | PerplexityResult]) -> ModelCard:
    from huggingface_hub import ModelCard

    adapter = config.adapter
    kind, is_cera = family(adapter.kind), adapter.kind == "cera"
    is_full = kind.trains_base
    datasets = [part.path for _, part in config.data.parts() if part.path and not part.train_files]
    data = card_data(config.model, "transformers" if is_full else "peft", adapter.kind.value, datasets)
    shape = "linear" if adapter.activation == "identity" else "non-linear"
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=escape(config.name),
        what=escape(f"The base model after {title(adapter)}" if is_full else f"A {title(adapter)} adapter"),
        branch=f"\nIts {shape} branch, `{kind.formula(adapter)}`, stays beside W0.\n" if is_cera else "",
        registers="import cera_train  # registers CeRA with PEFT\n" if is_cera else "",
        loader="AutoModelForCausalLM" if is_full else "AutoPeftModelForCausalLM",
        trained=_table(_trained(config, result)),
        measured=_table(_measured(config, result, evaluations)),
        terms=f"The base weights are under `{escape(data.license)}`; an adapter of theirs comes under its terms."
        if data.license
        else "The licence of the base weights is not on record here: see where they come from.",
    )


def card_data(model: ModelConfig, library: str, tag: str, datasets: list[str] | None = None) -> ModelCardData:
    """The metadata by which the Hub finds an adapter or a model."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=model.hub_id,
        library_name=library,
        license=model.known_facts.license if model.known_facts else None,
        datasets=datasets,
        tags=[tag],
        pipeline_tag="text-generation",
    )


def _trained(config: Config, result: RunResult) -> dict[str, str]:
    model, adapter, targets = config.model, config.adapter, config.adapter.target_modules
    rank = "" if adapter.r is None else f" of rank {adapter.r}"
    modules = targets or "" if isinstance(targets, str | None) else ", ".join(targets)
    places = " and ".join(filter(None, (modules, adapter.adapted_experts)))
    where = f" on {places}" if places else ""
    start = {"Starts from": f"{adapter.start_from}, digest {adapter.start_digest}"} if adapter.start_from else {}
    return {
        "Base model": model.path + (f", revision {model.revision}" if model.revision else ""),
        "Base weights": model.dtype.value if model.quantization == "none" else model.quantization.value,
        "Adapter": f"{title(adapter)}{rank}{where}",
        **start,
        "Trainable parameters": f"{result.trainable_parameters:,}",
        "Data": " + ".join(rows_of(part) for _, part in config.data.parts()),
        "Training": f"{result.updates:,} updates of {config.train.batch_size} sequences, "
        f"{config.optimizer.kind.value}, learning rate {config.optimizer.lr:g}, seed {config.train.seed}",
    }


def rows_of(data: DataConfig) -> str:
    """What an adapter was trained on."""
    if data.layout == Layout.logistic_map:
        growths = [f"{growth:g}" for growth in data.logistic_map.growths]
        several = f" at r = {', '.join(growths)}" if len(growths) > 1 else ""
        return f"the logistic map x' = {'r' if several else growths[0]} x (1 - x){several}"
    if data.layout == Layout.reasoning_gym:
        level = "" if data.reasoning_gym.level is None else f", level {data.reasoning_gym.level}"
        return f"{', '.join(data.reasoning_gym.generators)} of reasoning-gym{level}"
    if data.train_files:
        return ", ".join(Path(name).name for name in data.train_files)
    return f"{data.path}{f' ({data.subset})' if data.subset else ''}, {data.train_split}"


def _measured(
    config: Config, result: RunResult, evaluations: list[AccuracyResult | PerplexityResult]
) -> dict[str, str]:
    before = "untouched base" if config.adapter.start_from is None else "before the first update"
    rows = {
        f"Perplexity, {before}": f"{result.perplexity_before:.3f}",
        "Perplexity": f"{result.perplexity:.3f}",
    }
    if (mean := result.spectrum.effective_rank_mean) is not None:
        rows["Effective rank, mean over modules"] = f"{mean:.1f} of {config.adapter.r}"
        rows["Effective rank, largest"] = f"{result.spectrum.effective_rank_max:.1f} of {config.adapter.r}"
    for evaluation in evaluations:
        if isinstance(evaluation, PerplexityResult):
            rows[f"{evaluation.task}, perplexity"] = f"{evaluation.perplexity:.3f}"
            continue
        for grader in ("exact", "verified"):
            if (accuracy := evaluation.accuracy(grader)) is not None:
                notes = [f"{evaluation.problems:,} problems"]
                if accuracy.interval is not None:
                    notes.insert(0, "95 % interval {:.1%} to {:.1%}".format(*accuracy.interval))
                rows[f"{evaluation.task}, {grader} pass@1"] = f"{accuracy.value:.1%} ({', '.join(notes)})"
    return rows


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {escape(name)} | {escape(value)} |" for name, value in rows.items())])


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = clean(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|#$~":
        text = text.replace(mark, f"\\{mark}")
    return text
