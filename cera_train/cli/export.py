"""`cera-export`: a LoRA or a plain model of a CeRA adapter, with a certificate of what is lost."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cera_train.cli.composition import check_trust, to_config
from cera_train.cli.start import errors_in_one_line, start_hydra
from cera_train.common.imports import heavy_imports
from cera_train.model.folder import check_model
from cera_train.runs.subject import find_subject
from cera_train.settings.serving import ExportConfig

EXPORT = "cera-export"


def main() -> None:
    start_hydra(EXPORT, "export", export)


def export(composed: DictConfig) -> None:
    """One export."""
    with errors_in_one_line(EXPORT):
        config = to_config(composed, ExportConfig)
        check_trust(composed, HydraConfig.get().overrides.task)
        subject = find_subject(config)  # before torch takes its seconds to import
        check_model(subject.model.path)
        config.check_model(subject.model)
        with heavy_imports():
            from cera_train.serving.export import export

        export(config)
