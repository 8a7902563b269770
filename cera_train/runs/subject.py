"""The model that a command works on: an adapter on its base, or a base alone. Found without loading
anything, so that a mistake is reported at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cera_train.adapters.folder import check_saved, check_start, is_saved_in, weights_file
from cera_train.common.errors import UserError
from cera_train.common.files import sha256_of
from cera_train.common.settings import require
from cera_train.common.terminal import announce_import
from cera_train.model.path import check_model
from cera_train.runs.records import load_config
from cera_train.runs.results import RunResult
from cera_train.settings.adapters import AdapterConfig
from cera_train.settings.data import DataConfig
from cera_train.settings.evaluation import SubjectConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.run import Config
from cera_train.settings.training import TrainConfig

EXPORT = "export_"  # and the form, in the folder of a run


@dataclass(frozen=True)
class Subject:
    """An adapter on its base model, or a base model alone. Evaluations go to eval/ in its folder,
    also those of an export; those of a best adapter or a checkpoint go to the run's, since training
    replaces their folders."""

    folder: Path
    model: ModelConfig
    adapter: Path | None = None
    run: Config | None = None  # that trained it, or that like= names, if that is known

    def __str__(self) -> str:
        return f"{self.name}, {self.model.path}"

    @property
    def name(self) -> str:
        return str(self.adapter or "the untouched model")

    @property
    def part(self) -> str:
        """Suffix of an evaluation's name: empty for the final adapter, else -best,
        -checkpoints-100, ..."""
        is_whole = self.run is None or self.adapter is None
        if is_whole or self.adapter.name == "adapter" or self.adapter == self.folder:
            return ""
        return f"-{'-'.join(self.adapter.relative_to(self.folder).parts)}"

    @property
    def data(self) -> DataConfig | None:
        """The rows that the adapter was trained on; None where they are unknown."""
        return self.run.data if self.run else None

    @property
    def train(self) -> TrainConfig:
        """Precision and micro-batches as in training, so that perplexity and spectra are those of
        training."""
        return self.run.train if self.run else TrainConfig()


def find_subject(config: SubjectConfig) -> Subject:
    """Resolves `run=` and `model=`. Raises UserError if a folder is missing, unfinished or without
    an adapter, or if the path cannot be that of a base model."""
    subject = _resolve(config)
    check_model(subject.model.path)
    return subject


def _resolve(config: SubjectConfig) -> Subject:
    if config.run == "base":
        run = None if config.like is None else _like(config)
        model = config.model or run.model
        name = Path(model.path).name.removeprefix("pypi:")
        return Subject(Path(config.output_dir) / f"base-{name}", model, run=run)
    folder = Path(config.run)
    root, adapter = find_adapter(folder, "run")
    check_saved(adapter)
    if root is None:  # an adapter from anywhere
        return Subject(folder, config.model or base_of(folder, config.trust_remote_code), folder)
    run = _trusted_run(config, root)
    place = adapter if is_export(adapter) else root
    return Subject(place, config.model or run.model, adapter, run)


def _like(config: SubjectConfig) -> Config:
    """The run that `like=` names."""
    root, _ = find_adapter(Path(config.like), "like")
    require(root is not None, f"like={config.like} belongs to no run: name the folder of one.")
    return _trusted_run(config, root)


def _trusted_run(config: SubjectConfig, root: Path) -> Config:
    """The config of a run. Raises UserError where its model has code that this command does not
    trust."""
    run = load_config(root / "config.yaml")
    require(
        config.model is not None or config.trust_remote_code or not run.model.trust_remote_code,
        f"{root}/config.yaml asks to run the Python code that comes with {run.model.path}. If you "
        f"trust that code, say so on the command line: trust_remote_code=true.",
    )
    return run


def find_adapter(folder: Path, setting: str) -> tuple[Path | None, Path]:
    """The run and the adapter's folder that a setting names: a finished run, or an adapter, which
    may belong to no run. Raises UserError if there is none."""
    root = folder
    adapter = folder / "adapter"
    if is_saved_in(folder):
        adapter = Path(os.path.abspath(folder))  # `.` shows no run that it lies in
        root = run_of(adapter)
    else:
        require(
            (folder / "config.yaml").is_file(),
            f"{setting}={folder} is not the folder of a run or of an adapter: expected a folder "
            "with config.yaml or adapter_config.json; a whole model is run=base model.path=FOLDER.",
        )
        require(
            (folder / "result.json").is_file(),
            f"{folder} is unfinished: let the same cera-train command finish it, or take its best "
            f"adapter so far, {setting}={folder}/best.",
        )
        require(
            is_saved_in(adapter),
            f"{folder} lacks its adapter, {adapter}: restore it, or train under another name.",
        )
    if root is not None and adapter.name == "adapter":
        recorded = (RunResult.find(root / "result.json") or RunResult()).adapter_digest
        require(
            recorded is None or recorded == digest_of(adapter),
            f"{adapter} is not the adapter that its run left: it was replaced, or its weights "
            "changed. Restore it, or name the other one in a folder of its own.",
        )
    return root, adapter


def find_start(config: AdapterConfig) -> Path:
    """The folder of the adapter that `adapter.start_from` names. Raises UserError if there is none,
    or if it does not fit the settings."""
    _, adapter = find_adapter(Path(config.start_from), "adapter.start_from")
    check_saved(adapter)
    announce_import("PyTorch and PEFT")
    check_start(config, adapter)
    return adapter


def run_of(adapter: Path) -> Path | None:
    """The run that an adapter's folder belongs to, as adapter/, best/, one of checkpoints/, or an
    export."""
    is_checkpoint = adapter.parent.name == "checkpoints"
    root = adapter.parent.parent if is_checkpoint else adapter.parent
    is_in_run = is_checkpoint or adapter.name in ("adapter", "best") or is_export(adapter)
    return root if is_in_run and (root / "config.yaml").is_file() else None


def is_export(folder: Path) -> bool:
    """Whether a folder has the name that cera-export gives it."""
    return folder.name.startswith(EXPORT)


def digest_of(adapter: Path) -> str:
    """Digest of an adapter's weights: the files in a folder can change."""
    return sha256_of(weights_file(adapter))[:16]


def base_of(adapter: Path, trust_remote_code: bool = False) -> ModelConfig:
    """The base model that an adapter names; a UserError if its adapter_config.json is broken or
    names none."""
    saved = check_saved(adapter)
    path = saved.get("base_model_name_or_path")
    if not (path and isinstance(path, str)):
        raise UserError(f"{adapter} does not name its base model: set model.path=....")
    return ModelConfig(
        path=path, revision=saved.get("revision"), trust_remote_code=trust_remote_code
    )
