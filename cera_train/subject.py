"""What an evaluation is of: an adapter on its base model, or a base model alone. It is found without loading anything,
so that a mistake gets its answer at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cera_train.config import Config, EvalConfig, ModelConfig, TrainConfig, load_config


@dataclass(frozen=True)
class Subject:
    """An adapter on its base model, or a base model alone."""

    folder: Path
    """Its evaluations lie in here, in eval/: a run's folder also for its best adapter and its checkpoints, whose own
    folders come and go."""
    model: ModelConfig
    adapter: Path | None
    run: Config | None
    """How it was trained, where that is on record."""

    @property
    def name(self) -> str:
        return str(self.adapter or "the untouched model")

    @property
    def part(self) -> str:
        """What of a run it is, for the name of an evaluation: nothing for the run's adapter itself, -best, ..."""
        if self.run is None or self.adapter.name == "adapter":
            return ""
        return f"-{'-'.join(self.adapter.relative_to(self.folder).parts)}"

    @property
    def train(self) -> TrainConfig:
        """Precision and micro-batches as in training, so that perplexity and spectra are those of training."""
        return self.run.train if self.run else TrainConfig()


def find_subject(config: EvalConfig) -> Subject:
    """What `run=` and `model=` mean.

    Raises:
        ValueError: there is no such folder, or it is unfinished or holds no adapter.
    """
    if config.run == "base":
        name = Path(config.model.path).name.removeprefix("pypi:")
        return Subject(Path(config.output_dir) / f"base-{name}", config.model, None, None)
    folder = Path(config.run)
    if (folder / "adapter_config.json").is_file():
        weights_of(folder)
        root = run_of(folder)
        if root is None:  # an adapter from anywhere
            return Subject(folder, config.model or base_of(folder), folder, None)
        run = load_config(root / "config.yaml")
        return Subject(root, config.model or run.model, folder, run)
    if not (folder / "config.yaml").is_file():
        what = "is not the folder of a run or of an adapter" if folder.exists() else "does not exist"
        raise ValueError(
            f"run={config.run} {what}: expected a folder that cera-train left (with config.yaml), an adapter's folder "
            "(with adapter_config.json), or base."
        )
    run = load_config(folder / "config.yaml")
    if not (folder / "result.json").is_file():
        best = f", or evaluate its best adapter so far, run={folder}/best" if (folder / "best").is_dir() else ""
        raise ValueError(f"{folder} is unfinished: let the same cera-train command finish it{best}.")
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise ValueError(f"{folder} lacks its adapter, {folder}/adapter: restore it, or train under another name.")
    weights_of(folder / "adapter")
    return Subject(folder, config.model or run.model, folder / "adapter", run)


def run_of(adapter: Path) -> Path | None:
    """The run that an adapter's folder is part of: its adapter/, its best/ or one of its checkpoints/."""
    if adapter.parent.name == "checkpoints":
        root = adapter.parent.parent
    elif adapter.name in ("adapter", "best"):
        root = adapter.parent
    else:
        return None
    return root if (root / "config.yaml").is_file() else None


def weights_of(adapter: Path) -> Path:
    """The file with an adapter's weights.

    Raises:
        ValueError: there is none. PEFT would look for it on the Hub, under the folder's name.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (adapter / name).is_file():
            return adapter / name
    raise ValueError(f"{adapter} lacks its weights, adapter_model.safetensors: restore the file.")


def digest_of(adapter: Path) -> str:
    """Of an adapter's weights: its folder can get others."""
    with weights_of(adapter).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def base_of(adapter: Path) -> ModelConfig:
    """The base model that an adapter names.

    Raises:
        ValueError: its adapter_config.json is broken or names none.
    """
    try:
        path = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{adapter}/adapter_config.json is broken: {error}") from error
    if not path:
        raise ValueError(f"{adapter} does not name its base model: set model=....")
    return ModelConfig(path=path)
