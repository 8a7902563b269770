"""Hydra's config loader: it guards against files from strangers, and composes a command once. Hydra takes no loader as
an argument, so its name in Hydra's module is replaced: the one name of Hydra that this project replaces."""

from __future__ import annotations

from pathlib import Path

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cera_train.common.files import config_dir
from cera_train.common.trust import check_hydra_section


class GuardedConfigLoader(ConfigLoaderImpl):
    """Checks every file of --config-dir, --config-path or hydra.searchpath where Hydra puts its content, before Hydra
    uses it."""

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        if "hydra" in result.config and not self._is_trusted(result):
            section = OmegaConf.to_container(result.config.hydra, resolve=False)
            check_hydra_section(section, f"{default.config_path}.yaml of {result.path}")
        return result

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        if config_name is None and not overrides:
            # Hydra would copy every config for each of a hundred calls of its help: a second.
            return self.repository.get_group_options(group_name, results_filter)
        return super().get_group_options(group_name, results_filter, config_name, overrides)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        if not validate_sweep_overrides:
            # Hydra looks for its mode alone, by a composition of its own: 50 ms. No file of ours sets it.
            modes = [override for override in overrides if override.startswith("hydra.mode=")]
            return OmegaConf.create({"hydra": {"mode": RunMode[modes[-1].partition("=")[2]] if modes else None}})
        return super().load_configuration(config_name, overrides, run_mode, from_shell)

    @staticmethod
    def _is_trusted(result: ConfigResult) -> bool:
        scheme, _, place = result.path.partition("://")
        if scheme == "file":
            return Path(place).resolve().is_relative_to(config_dir("conf").resolve())
        return scheme in ("structured", "pkg")  # our schemas and recipes, those of plugins and of Hydra


def guard_composition() -> None:
    """Makes Hydra compose with `GuardedConfigLoader`."""
    hydra._internal.hydra.ConfigLoaderImpl = GuardedConfigLoader
