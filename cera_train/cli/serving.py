"""`cera-chat` and `cera-export`: an adapter in use. Both check settings and folders before torch takes its seconds to
import."""

from __future__ import annotations

from dataclasses import replace

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cera_train.cli.start import announce_imports, check_trust, start_hydra, to_config
from cera_train.common.imports import heavy_imports
from cera_train.model.folder import check_model
from cera_train.runs.subject import find_subject
from cera_train.settings.serving import ChatConfig, ExportConfig


def chat_main() -> None:
    start_hydra("cera-chat", chat)


def chat(composed: DictConfig) -> None:
    config = to_config(composed, ChatConfig)
    check_trust(composed, HydraConfig.get().overrides.task)
    for place in filter(None, [config.run, config.compare]):
        check_model(find_subject(replace(config, run=place)).model.path)
    announce_imports()
    with heavy_imports():
        from cera_train.serving.chat import chat

    chat(config)


def export_main() -> None:
    start_hydra("cera-export", export)


def export(composed: DictConfig) -> None:
    config = to_config(composed, ExportConfig)
    check_trust(composed, HydraConfig.get().overrides.task)
    subject = find_subject(config)
    check_model(subject.model.path)
    config.check_model(subject.model)
    announce_imports()
    with heavy_imports():
        from cera_train.serving.export import export

    export(config)
