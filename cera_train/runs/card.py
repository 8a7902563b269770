"""The model card of an adapter with its evaluations, and the upload of both to the Hub."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from transformers import AutoModelForCausalLM, PretrainedConfig

from cera_train.adapters.families import family, title
from cera_train.adapters.families.base import is_import_path
from cera_train.adapters.folder import description_file
from cera_train.common.errors import UserError
from cera_train.common.files import read_json, read_yaml, write_text
from cera_train.common.terminal import print_line
from cera_train.common.trust import for_markdown
from cera_train.data.chats import may_use_template
from cera_train.data.templates import DATE, WITHOUT
from cera_train.model.weights import auto_class
from cera_train.runs.evaluation_folder import AccuracyResult, find_evaluation_result
from cera_train.runs.records import load_config
from cera_train.runs.results import Environment, RunResult, describe_tasks, figure
from cera_train.runs.subject import digest_of
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.data import DataConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config

CARD = """---
{data}
---

# {name}

{what}, trained with cera-train.

| | |
|---|---|
{table}

{snippet}
"""

SNIPPET = """## How to load it

```python
{registers}{load}
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
{asks}```"""

LOAD = """from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("FOLDER"{trust})  # where this file lies"""

LOAD_ON_BASE = """from peft import PeftConfig, PeftModel
from transformers import {loader}, AutoTokenizer

adapter = PeftConfig.from_pretrained("FOLDER")  # where this file lies
base = {loader}.from_pretrained(
    adapter.base_model_name_or_path, revision=adapter.revision{trust}
)
model = PeftModel.from_pretrained(base, "FOLDER")"""
"""For an adapter of a base without a causal class, which no class of PEFT's loads."""

ASKS = """
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}],
    add_generation_prompt=True,
    tokenize=False,{settings}
){without}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write_card(run: Path, result: RunResult, architecture: PretrainedConfig) -> None:
    """Writes adapter/README.md: the method, the base, the rows, the scores of the run and of its
    evaluations, and code that loads the adapter.

    Args:
        architecture: of the base.
    """
    config = load_config(run / "config.yaml")
    method = title(config.adapter)
    is_full = family(config.adapter.kind).trains_base
    library = "transformers" if is_full else "peft"
    data = card_data(config.model, library, config.adapter.kind.value, hub_datasets(config.data))
    text = CARD.format(
        data=data.to_yaml(),
        name=for_markdown(config.name),
        what=for_markdown(f"The base model after {method}" if is_full else f"A {method} adapter"),
        table="\n".join(
            f"| {for_markdown(name)} | {for_markdown(value)} |"
            for name, value in (_facts(config, result) | _scores(run)).items()
        ),
        snippet=snippet(
            run / "adapter",
            library,
            config.data,
            config.model,
            architecture,
            registers(config.adapter),
        ),
    )
    write_text(run / "adapter" / "README.md", text)


def hub_datasets(data: DataConfig) -> list[str]:
    """The data sets of the Hub that gave training rows."""
    parts = [part for _, part in data.trained_parts()]
    return [part.path for part in parts if part.path and not part.train_files]


def registers(adapter: AdapterConfig) -> str:
    """The line of code that makes a method outside PEFT known to it; empty for PEFT's own."""
    if adapter.kind == AdapterKind.cera:
        return "import cera_train  # registers CeRA with PEFT\n"
    if is_import_path(adapter.method):
        module, _, name = adapter.method.rpartition(".")
        return f"import {module}  # registers {name} with PEFT\n"
    return ""


def snippet(
    folder: Path,
    library: str,
    data: DataConfig | None,
    model: ModelConfig,
    architecture: PretrainedConfig,
    registers: str = "",
) -> str:
    """The section of a card that loads what a folder holds, and asks it a question by the chat
    template if it was trained on chats.

    Args:
        library: peft for an adapter, transformers for a plain model.
        data: the rows that it was trained on, if they are known.
        model: the base, whose code the loaded model may need.
        architecture: of the base.
        registers: a line of code, before all others.
    """
    asks = ""
    if data is not None and (folder / "chat_template.jinja").is_file():
        _, first = next(data.trained_parts())
        settings = dict(first.template_settings)
        settings.pop(DATE, None)
        without = settings.pop(WITHOUT, None)
        lines = [f"\n    {name}={value!r}," for name, value in settings.items()]
        if may_use_template(first):
            asks = ASKS.format(
                settings="".join(lines),
                without=f".removesuffix({without!r})" if without else "",
            )
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    kind = auto_class(architecture)
    loader = kind.__name__
    load = LOAD
    if library == "peft" and kind is AutoModelForCausalLM:
        loader = "AutoPeftModelForCausalLM"
    elif library == "peft":
        load = LOAD_ON_BASE
    return SNIPPET.format(
        registers=registers,
        load=load.format(library=library, loader=loader, trust=trust),
        trust=trust,
        asks=asks,
    )


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
    rank = f" of rank {result.adapter_r}" if result.adapter_r else ""
    where = f" on {adapter.places}" if adapter.places else ""
    rows = {
        "Method": f"{title(adapter)}{rank}{where}",
        "Base model": model.path + (f", revision {model.revision}" if model.revision else ""),
        "Rows": config.data.title,
        "Perplexity": figure(result.perplexity),
        "Tasks": describe_tasks(result.tasks),
    }
    return {name: text for name, text in rows.items() if text}


def _scores(run: Path) -> dict[str, str]:
    """The evaluations of a run's final adapter, by their main accuracy: 5.1% (95 % interval 3.9%
    to 6.3%), exact/pass@1, 1,319 problems."""
    scores = {}
    folders = sorted((run / "eval").glob("*"))
    digest = digest_of(run / "adapter") if folders else None  # reads all weights: once
    for folder in folders:
        result = find_evaluation_result(folder)
        if not (isinstance(result, AccuracyResult) and result.accuracies):
            continue
        if read_yaml(folder / "config.yaml").get("adapter_digest") != digest:
            continue
        key, interval = next(iter(result.accuracies.items()))
        text = f"{result.details[key]:.1%}"
        if interval is not None:
            text += " (95 % interval {:.1%} to {:.1%})".format(*interval)
        scores[f"Evaluation, {folder.name}"] = f"{text}, {key}, {result.problems:,} problems"
    return scores


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
        repository = api.create_repo(config.hub.push, private=True, exist_ok=True)
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
        command = Environment(command=sys.argv).command_line
        raise UserError(
            f"hub.push={config.hub.push} failed ({error}). The run is finished; to upload it: "
            f"{command}"
        ) from error
