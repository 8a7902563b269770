"""Puts CeRA layers into a model, and keeps PEFT's promises that a non-linear branch can keep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .bypass import bypass, exclude_bypassed, keep_scale, runs_beside
from .config import CeraConfig
from .layer import BASE_ADAPTER, MERGE_REFUSAL, CeraLayer


class CeraModel(BaseTuner):
    """A model whose targeted projections carry CeRA branches. Built by `peft.get_peft_model`."""

    prefix = "cera_"
    tuner_layer_cls = CeraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # --- building ----------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, config: CeraConfig, model_config: dict[str, Any]) -> CeraConfig:
        if config.target_modules is None:
            config.target_modules = ["q_proj", "v_proj"]  # the paper's, for every architecture
        return config

    @staticmethod
    def _check_target_module_exists(config: CeraConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(config, key)
        if found and config.layers_to_transform is not None and key in config.target_modules:
            # PEFT forgets the layers for a module given by its whole name, and all-linear gives whole names.
            config = replace(config, target_modules=[key.rpartition(".")[2]])
            found = "." in key and BaseTuner._check_target_module_exists(config, key)
        return found

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Leaves out of all-linear what would never run, and records it in `exclude_modules`."""
        keep_scale(model)
        config = self.peft_config[adapter_name]
        is_all = str(config.target_modules).lower() == "all-linear"
        if is_all and (found := exclude_bypassed(config, model)):
            warnings.warn(f"all-linear leaves out {', '.join(found)}: {next(iter(found.values()))}.", stacklevel=2)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_compatiblity(self, *args: Any) -> None:
        """Does nothing: PEFT's list of Mamba models is for LoRA. `_create_and_replace` asks the model's source."""

    def _create_and_replace(
        self,
        config: CeraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if (found := bypass(parent, target_name)) is not None and not (found.is_fused and config.inference_mode):
            others = ", ".join(runs_beside(parent)) or "modules of another kind"
            unfused = ", or call cera_train.cera.unfuse(model) before" if found.is_fused else ""
            raise ValueError(f"target module {current_key!r}: {found}. Target {others} instead{unfused}.")
        if isinstance(target, CeraLayer):
            target.update_layer(adapter_name, config)
            return
        try:
            layer = CeraLayer(target, adapter_name, config)
        except TypeError as error:
            raise ValueError(f"target module {current_key!r} cannot be adapted. {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, CeraLayer):
                    layer.cast_to_base_dtype(adapter_name)

    # --- a different adapter for each row of a batch ------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names` to the layers: a different adapter for each row of a batch, as serving needs it."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works at inference only: call model.eval() first.")
        unknown = set(adapter_names) - set(self.peft_config) - {BASE_ADAPTER}
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(sorted(unknown))}; the adapters of this model are "
                f"{', '.join(sorted(self.peft_config))}, and {BASE_ADAPTER} for none."
            )
        copies = self._copies_of_a_row(kwargs)

        def add_names(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # an encoder still runs on the rows themselves
            repeats = 1 if len(args[0]) == len(adapter_names) else copies
            names = [name for name in adapter_names for _ in range(repeats)]
            if isinstance(layer, AuxiliaryTrainingWrapper):  # fails on an adapter that has no module to save here
                names = [name if name in layer._get_available_adapters() else BASE_ADAPTER for name in names]
            return args, kwargs | {"adapter_names": names}

        hooks = [
            layer.register_forward_pre_hook(add_names, with_kwargs=True)
            for layer in self.modules()
            if isinstance(layer, (CeraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _copies_of_a_row(self, generate_kwargs: dict[str, Any]) -> int:
        """Copies that generate() makes of every row: one for each beam, or for each sequence it returns."""
        configs = generate_kwargs.get("generation_config"), getattr(self.model, "generation_config", None)

        def setting(name: str) -> int:
            given = [generate_kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in given if value is not None), 1)

        return max(setting("num_beams"), setting("num_return_sequences"))

    # --- what a branch that is not a matrix cannot do -----------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of branches is not a branch."""
        raise ValueError(
            "CeRA adapters cannot be combined into one: the sum of two non-linear branches is not a branch of that "
            "rank. Make both active instead: model.base_model.set_adapter([...])."
        )

    # --- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CeraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuses a checkpoint that lacks a tensor of the adapter, or holds one the model has no place for.

        PEFT loads with `strict=False`, since an adapter's checkpoint never has the base weights. A wrong checkpoint
        would then silently evaluate the base model.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        places = set(model.state_dict())
        needed = {
            key for key in places if key.endswith((f".cera_A.{adapter_name}.weight", f".cera_B.{adapter_name}.weight"))
        }
        missing = sorted(needed - set(state_dict))
        extra = sorted(
            key for key in state_dict if key not in places and key.removeprefix("base_model.model.") not in places
        )
        if missing or extra:
            raise ValueError(
                f"the checkpoint does not fit this CeRA adapter: {len(missing)} tensors missing{_first(missing)}, "
                f"{len(extra)} without a place in the model{_first(extra)}. "
                "Check that it belongs to this base model and to these target_modules."
            )
        return state_dict


def _first(keys: list[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""
