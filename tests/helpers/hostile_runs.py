"""What a stranger sends: a run, an adapter, and what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cera_train.common.settings import to_plain
from cera_train.settings.evaluation import EvalConfig, GenerationConfig
from cera_train.settings.run import Config
from cera_train.settings.tasks import TaskConfig

ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def write_adapter(folder: Path, base: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = ADAPTER_CONFIG | {"base_model_name_or_path": base} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").touch()
    return folder


def write_run(folder: Path, config: Config, **changes: Any) -> Path:
    """A stranger's finished run."""
    write_adapter(folder / "adapter", config.model.path, **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    (folder / "result.json").write_text("{}")
    return folder


def evaluation(run: Path, **changes: Any) -> EvalConfig:
    task = TaskConfig(kind="gsm8k", name="gsm8k", prompt="{question}", files=["rows.jsonl"])
    return EvalConfig(run=str(run), task=task, generation=GenerationConfig(), **changes)
