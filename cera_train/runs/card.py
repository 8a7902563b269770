"""The model card of an adapter, and the upload of both to the Hub."""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from transformers import PretrainedConfig

from cera_train.adapters.families import family, title
from cera_train.adapters.folder import description_file
from cera_train.common.errors import UserError
from cera_train.common.files import read_json, write_text
from cera_train.common.terminal import print_line
from cera_train.common.trust import for_markdown
from cera_train.model.weights import auto_class
from cera_train.runs.records import load_config
from cera_train.runs.results import Environment, RunResult, describe_tasks, figure
from cera_train.settings.adapters import AdapterKind
from cera_train.settings.run import Config

CARD = """---
{data}
---

# {name}

{what}, trained with cera-train.

| | |
|---|---|
{table}

## How to load it

```python
{load}
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```
"""

LOAD = """from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("FOLDER"{trust})  # where this file lies"""

LOAD_ON_BASE = """from peft import PeftConfig, PeftModel
from transformers import {loader}, AutoTokenizer

adapter = PeftConfig.from_pretrained("FOLDER")  # where this file lies
base = {loader}.from_pretrained(
    adapter.base_model_name_or_path, revision=adapter.revision{trust}
)
model = PeftModel.from_pretrained(base, "FOLDER")"""

LOAD_CERA = f"import cera_train  # registers CeRA with PEFT\n{LOAD_ON_BASE}"


def write_card(run: Path, result: RunResult, architecture: PretrainedConfig) -> None:
    """Writes adapter/README.md: the method, the base, the rows, the scores of the run, and code
    that loads the adapter.

    Args:
        architecture: of the base.
    """
    config = load_config(run / "config.yaml")
    kind = config.adapter.kind
    method = title(config.adapter)
    what = f"A {method} adapter"
    library = "peft"
    load = LOAD_CERA if kind == AdapterKind.cera else LOAD_ON_BASE
    if family(kind).trains_base:
        what = f"The base model after {method}"
        library = "transformers"
        load = LOAD
    data = ModelCardData(
        base_model=config.model.hub_id,
        library_name=library,
        tags=[kind.value],
        pipeline_tag="text-generation",
    )
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    text = CARD.format(
        data=data.to_yaml(),
        name=for_markdown(config.name),
        what=for_markdown(what),
        table="\n".join(
            f"| {for_markdown(name)} | {for_markdown(value)} |"
            for name, value in _facts(config, result).items()
        ),
        load=load.format(loader=auto_class(architecture).__name__, trust=trust),
        trust=trust,
    )
    write_text(run / "adapter" / "README.md", text)


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


# --- the Hub --------------------------------------------------------------------------------------


def push(config: Config) -> None:
    """Uploads the adapter of a run, if it is finished. Raises UserError with the command that
    repeats the upload: the run's, whose result stands."""
    run = Path(config.output_dir) / config.name
    if config.hub.push is None or not (run / "result.json").is_file():
        return
    adapter = run / "adapter"
    try:
        api = HfApi()
        repository = api.create_repo(config.hub.push, private=True, exist_ok=True)
        to = {"repo_id": repository.repo_id, "commit_message": f"Upload {config.name}"}
        api.upload_folder(folder_path=adapter, **to)
        if config.model.hub_id is not None:  # the file may name a local folder
            file = description_file(adapter)
            description = read_json(file) | {"base_model_name_or_path": config.model.hub_id}
            content = json.dumps(description, indent=2).encode()
            api.upload_file(path_or_fileobj=content, path_in_repo=file.name, **to)
        print_line("hub", str(repository))
    except Exception as error:
        command = Environment(command=sys.argv).command_line
        raise UserError(
            f"hub.push={config.hub.push} failed ({error}). The run is finished; to upload it: "
            f"{command}"
        ) from error
