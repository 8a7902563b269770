"""The model card of an adapter with its evaluations, and the upload of both to the Hub."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResultEntry,
    HfApi,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from transformers import AutoModelForCausalLM, PretrainedConfig

from cera_train.adapters.families import family, title
from cera_train.adapters.families.base import is_import_path
from cera_train.adapters.folder import description_file
from cera_train.common.errors import UserError
from cera_train.common.files import read_json, remove_folder, write_text
from cera_train.common.terminal import print_line
from cera_train.common.trust import for_markdown
from cera_train.data.chats import may_use_template
from cera_train.data.templates import DATE, WITHOUT
from cera_train.model.weights import auto_class
from cera_train.runs.evaluation_folder import AccuracyResult, find_evaluation_result
from cera_train.runs.records import load_config
from cera_train.runs.results import (
    Environment,
    RunResult,
    describe_rank,
    describe_tasks,
    figure,
)
from cera_train.runs.subject import digest_of
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config

CARD = """---
{data}
---

# {name}

{what}, trained with cera-train.{branch}

{snippet}

## How it was trained, and what was measured

| | |
|---|---|
{table}

## Licence

{terms}
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

EVALUATIONS = ".eval_results"
"""Folder of an adapter: its evaluations as the Hub reads them, one file a data set."""


def write_card(run: Path, result: RunResult, architecture: PretrainedConfig) -> None:
    """Writes adapter/README.md from the config, the result and the evaluations of a run, and the
    evaluations again as metadata of the Hub.

    Args:
        architecture: of the base.
    """
    config = load_config(run / "config.yaml")
    evaluations = _evaluations(run)
    _write_entries(run / "adapter" / EVALUATIONS, evaluations)
    kind = family(config.adapter.kind)
    method = title(config.adapter)
    is_cera = config.adapter.kind == "cera"
    is_full = kind.trains_base
    library = "transformers" if is_full else "peft"
    datasets = hub_datasets(config.data)
    data = card_data(config.model, library, config.adapter.kind.value, datasets)
    text = CARD.format(
        data=data.to_yaml(),
        name=for_markdown(config.name),
        what=for_markdown(f"The base model after {method}" if is_full else f"A {method} adapter"),
        branch=" Its branch, `s B gate(A x)`, stays beside W0." if is_cera else "",
        snippet=snippet(
            run / "adapter",
            library,
            config.data,
            config.model,
            architecture,
            registers(config.adapter),
        ),
        table="\n".join(
            f"| {for_markdown(name)} | {for_markdown(value)} |"
            for name, value in (_facts(config, result) | _accuracies(evaluations)).items()
        ),
        terms=f"The base weights are under `{for_markdown(data.license)}`; an adapter of theirs "
        f"comes under its terms."
        if data.license
        else "The licence of the base weights is not on record here: see where they come from.",
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


# --- evaluations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """A finished evaluation of a run's final adapter, by its main accuracy."""

    config: EvalConfig
    result: AccuracyResult
    key: str  # such as exact/pass@1

    @property
    def is_whole(self) -> bool:
        """Whether it took all problems of a data set of the Hub."""
        task = self.config.task
        part = task.files or task.limit or task.level
        return task.path is not None and not part

    @property
    def text(self) -> str:
        """5.1 % (95 % interval 3.9 to 6.3 %), greedy, 1,319 problems"""
        text = f"{self.result.details[self.key]:.1%}"
        if (interval := self.result.accuracies[self.key]) is not None:
            text += " (95 % interval {:.1%} to {:.1%})".format(*interval)
        temperature = self.config.generation.temperature
        sampled = f"temperature {temperature:g}" if temperature else "greedy"
        return f"{text}, {self.key}, {sampled}, {self.result.problems:,} problems"


def _evaluations(run: Path) -> list[_Evaluation]:
    evaluations = []
    folders = sorted((run / "eval").glob("*"))
    digest = digest_of(run / "adapter") if folders else None  # reads all weights: once
    for folder in folders:
        result = find_evaluation_result(folder)
        if not isinstance(result, AccuracyResult):
            continue
        config = load_config(folder / "config.yaml", EvalConfig)
        keys = list(result.accuracies)
        if keys and config.adapter_digest == digest:
            evaluations.append(_Evaluation(config, result, keys[0]))
    return evaluations


def _accuracies(evaluations: Sequence[_Evaluation]) -> dict[str, str]:
    return {f"Evaluation, {each.config.folder_name}": each.text for each in evaluations}


def _write_entries(folder: Path, evaluations: Sequence[_Evaluation]) -> None:
    """One file a data set. The Hub compares whole data sets, so parts of one have no entry."""
    if folder.exists():
        remove_folder(folder)
    for each in evaluations:
        if not each.is_whole:
            continue
        task = each.config.task
        entry = EvalResultEntry(
            dataset_id=task.path,
            task_id=task.name,
            value=each.result.details[each.key],
            dataset_revision=task.revision,
            notes=each.text,
        )
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        write_text(folder / f"{each.config.folder_name}.yaml", text)


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
