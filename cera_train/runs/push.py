"""`hub.push`: the adapter of a finished run, with its tokenizer and model card, on the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from cera_train.adapters.saved import description_file
from cera_train.common.files import read_json
from cera_train.common.terminal import print_line
from cera_train.runs.tracking import print_error
from cera_train.settings.run import Config


def push(config: Config) -> None:
    """Uploads the adapter of a run, if it is finished. A failure prints the command that repeats the upload: the run's,
    whose result stands."""
    from huggingface_hub import CommitOperationAdd, HfApi

    run = Path(config.output_dir) / config.name
    if config.hub.push is None or not (run / "result.json").is_file():
        return
    adapter = run / "adapter"
    contents = {path: path for path in adapter.rglob("*") if path.is_file()}
    if config.model.hub_id is not None:  # the file may name a folder of this machine
        description = read_json(description_file(adapter)) | {"base_model_name_or_path": config.model.hub_id}
        contents[description_file(adapter)] = json.dumps(description, indent=2).encode()
    try:
        api = HfApi()
        repository = api.create_repo(config.hub.push, private=config.hub.private, exist_ok=True)
        files = [CommitOperationAdd(str(path.relative_to(adapter)), content) for path, content in contents.items()]
        api.create_commit(repository.repo_id, files, commit_message=f"Upload {config.name}, trained with cera-train")
        print_line("hub", str(repository))
    except Exception as error:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        print_error(f"hub.push={config.hub.push} failed ({error}). The run is finished; to upload it: {command}")
