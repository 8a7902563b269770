"""The model card of an adapter, and the upload of both to the Hub."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData

from cera_train.adapters.families import family, title
from cera_train.adapters.folder import description_file
from cera_train.common.errors import UserError
from cera_train.common.files import read_json, write_text
from cera_train.common.terminal import print_line
from cera_train.common.trust import for_markdown
from cera_train.runs.records import load_config
from cera_train.runs.results import RunResult, describe_rank, describe_tasks, figure
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config

CARD = """---
{data}
---

# {name}

{what}, trained with cera-train.{branch}

## How to load it

```python
{registers}from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("FOLDER")  # where this file lies
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## How it was trained, and what was measured

| | |
|---|---|
{table}

## Licence

{terms}
"""


def write_card(run: Path, result: RunResult) -> None:
    """Writes adapter/README.md from the config and the result of a run."""
    config = load_config(run / "config.yaml")
    kind = family(config.adapter.kind)
    method = title(config.adapter)
    is_cera = config.adapter.kind == "cera"
    is_full = kind.trains_base
    library = "transformers" if is_full else "peft"
    datasets = [part.path for _, part in config.data.parts() if part.path and not part.train_files]
    data = card_data(config.model, library, config.adapter.kind.value, datasets)
    text = CARD.format(
        data=data.to_yaml(),
        name=for_markdown(config.name),
        what=for_markdown(f"The base model after {method}" if is_full else f"A {method} adapter"),
        branch=" Its branch, `s B gate(A x)`, stays beside W0." if is_cera else "",
        registers="import cera_train  # registers CeRA with PEFT\n" if is_cera else "",
        library=library,
        loader="AutoModelForCausalLM" if is_full else "AutoPeftModelForCausalLM",
        table="\n".join(
            f"| {for_markdown(name)} | {for_markdown(value)} |"
            for name, value in _facts(config, result).items()
        ),
        terms=f"The base weights are under `{for_markdown(data.license)}`; an adapter of theirs "
        f"comes under its terms."
        if data.license
        else "The licence of the base weights is not on record here: see where they come from.",
    )
    write_text(run / "adapter" / "README.md", text)


def card_data(
    model: ModelConfig, library: str, tag: str, datasets: Sequence[str] = ()
) -> ModelCardData:
    """The metadata by which the Hub finds an adapter or a model."""
    return ModelCardData(
        base_model=model.hub_id,
        library_name=library,
        license=model.facts.license if model.facts else None,
        datasets=list(datasets) or None,
        tags=[tag],
        pipeline_tag="text-generation",
    )


def _facts(config: Config, result: RunResult) -> dict[str, str]:
    model = config.model
    adapter = config.adapter
    train = config.train
    effective_rank = describe_rank(result.spectrum)
    rank = f" of rank {result.adapter_r}" if result.adapter_r else ""
    where = f" on {adapter.places}" if adapter.places else ""
    before = "before the first update" if adapter.start_from else "untouched base"
    rows = {
        "Base model": model.path + (f", revision {model.revision}" if model.revision else ""),
        "Base weights": model.dtype.value
        if model.quantization == "none"
        else model.quantization.value,
        "Adapter": f"{title(adapter)}{rank}{where}",
        "Starts from": f"{adapter.start_from}, digest {adapter.start_digest}"
        if adapter.start_from
        else "",
        "Trainable parameters": figure(result.trainable_parameters, 0),
        "Data": config.data.title,
        "Training": f"{figure(result.updates, 0)} updates of {train.batch_size} sequences, "
        f"{config.optimizer.kind.value}, learning rate {config.optimizer.lr:g}, seed {train.seed}",
        f"Perplexity, {before}": figure(result.perplexity_before),
        "Perplexity": figure(result.perplexity),
        "Effective rank": effective_rank and f"{effective_rank} (of {result.adapter_r})",
        "Tasks": describe_tasks(result.tasks),
    }
    return {name: text for name, text in rows.items() if text}


# --- the Hub --------------------------------------------------------------------------------------


def push(config: Config) -> None:
    """Uploads the adapter of a run, if it is finished. Raises UserError with the command that
    repeats the upload: the run's, whose result stands."""
    run = Path(config.output_dir) / config.name
    if config.hub.push is None or not (run / "result.json").is_file():
        return
    adapter = run / "adapter"
    contents = {path: path for path in adapter.rglob("*") if path.is_file()}
    if config.model.hub_id is not None:  # the file may name a local folder
        description = read_json(description_file(adapter)) | {
            "base_model_name_or_path": config.model.hub_id
        }
        contents[description_file(adapter)] = json.dumps(description, indent=2).encode()
    try:
        api = HfApi()
        repository = api.create_repo(config.hub.push, private=config.hub.private, exist_ok=True)
        files = [
            CommitOperationAdd(str(path.relative_to(adapter)), content)
            for path, content in contents.items()
        ]
        api.create_commit(
            repository.repo_id,
            files,
            commit_message=f"Upload {config.name}, trained with cera-train",
        )
        print_line("hub", str(repository))
    except Exception as error:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        raise UserError(
            f"hub.push={config.hub.push} failed ({error}). The run is finished; to upload it: "
            f"{command}"
        ) from error
