"""Puts CeRA layers into a model, and keeps PEFT's promises that a non-linear branch can keep."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import _get_submodules
from torch import nn

from .config import CeraConfig
from .coverage import bypassed_projections, exclude_projections
from .experts import CeraExperts, expert_names, expert_parameters
from .layer import CeraLayer, CeraLinear


class CeraModel(BaseTuner):
    """A model whose targeted projections carry CeRA branches. Built by `peft.get_peft_model`.

    Methods with an underscore are those that PEFT calls or that a tuner of PEFT overrides.
    """

    prefix = "cera_"
    tuner_layer_cls = CeraLayer
    target_module_mapping: ClassVar = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- building ---------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter to the model, as PEFT does. all-linear leaves out the projections that
        kernels bypass, and records them in `exclude_modules`."""
        config = self.peft_config[adapter_name]
        if str(config.target_modules).lower() == "all-linear":
            exclude_projections(config, bypassed_projections(model))
        try:
            with warnings.catch_warnings():
                if config.target_parameters:  # PEFT looks for patterns among modules alone
                    warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError:  # a refused adapter leaves no branch behind
            for layer in model.modules():
                if isinstance(layer, CeraLayer):
                    layer.delete_adapter(adapter_name)
            raise

    def _prepare_adapter_config(
        self, config: CeraConfig, model_config: dict[str, Any]
    ) -> CeraConfig:
        """Without targets: q_proj and v_proj, the paper's; where a model has none, PEFT's for
        LoRA."""
        if config.target_modules is None and config.target_parameters:
            config.target_modules = []
        names = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        is_expression = isinstance(
            self.target_module_mapping.get(model_config.get("model_type")), str
        )
        if config.target_modules is None and names >= {"q_proj", "v_proj"} and not is_expression:
            config.target_modules = {"q_proj", "v_proj"}
        return super()._prepare_adapter_config(config, model_config)

    def _check_target_module_compatiblity(self, *args: Any) -> None:
        """Does nothing: PEFT's check of Mamba models is for LoRA, and `coverage` finds what does
        not run."""

    def _create_and_replace(
        self,
        config: CeraConfig,
        adapter_name: str,
        target: nn.Module,
        *args: Any,
        current_key: str,
    ) -> None:
        if isinstance(target, CeraExperts) or expert_parameters(target):
            raise ValueError(
                f"target module {current_key!r} holds experts: name its parameters in "
                "target_parameters."
            )
        self._adapt(CeraLinear, current_key, adapter_name, config.of_module(current_key))

    def _adapt(
        self,
        layer_class: type[CeraLayer],
        key: str,
        adapter_name: str,
        config: CeraConfig | dict[str, CeraConfig],
    ) -> None:
        """Adds an adapter to a layer, or puts a layer with it in a module's place."""
        parent, target, target_name = _get_submodules(self.model, key)
        try:
            if isinstance(target, layer_class):
                target.update_layer(adapter_name, config)
                return
            layer = layer_class(target, adapter_name, config)
        except TypeError as error:
            raise ValueError(f"{key!r} cannot be adapted. {error}") from error
        if adapter_name not in self.active_adapters:
            # Another adapter is not trainable until it is made active.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _targeted_parameters(self, config: CeraConfig, model: nn.Module) -> dict[str, list[str]]:
        """Names of the parameters in target_parameters, by their module's.

        Raises:
            ValueError: a name matches nothing.
        """
        found = defaultdict(list)
        matched = set()
        for full_name, _ in model.named_parameters():
            if ".cera_" in full_name or not config.target_parameters:
                continue
            key, _, name = full_name.replace(".base_layer.", ".").rpartition(".")
            by = {
                target
                for target in config.target_parameters
                if f".{key}.{name}".endswith(f".{target}")
            }
            matched |= by
            # by its last name: PEFT forgets layers_to_transform for a module given by its whole
            # name
            last = key.rpartition(".")[2]
            if by and self._check_target_module_exists(replace(config, target_modules=[last]), key):
                found[key].append(name)
        for target in config.target_parameters or []:
            if target not in matched:
                experts = ", ".join(expert_names(model)) or "none: it is dense"
                raise ValueError(
                    f"target_parameters: {target!r} matches no parameter of this model. Its "
                    f"experts' are {experts}."
                )
        return found

    def _inject_parameters(
        self, peft_config: CeraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Puts branches on experts, on all targeted parameters of a module at once."""
        targets = self._targeted_parameters(peft_config, model)
        for key, names in targets.items():
            configs = {name: peft_config.of_module(f"{key}.{name}") for name in names}
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                self._adapt(CeraExperts, key, adapter_name, configs)
        return [f"{key}.{name}" for key, names in targets.items() for name in names]

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's would also assign weights, which fails where it takes trainable tokens out, and
        # move the branch, which the layer has done.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, CeraLayer) and adapter_name in layer.cera_A:
                    for part in layer.parts(adapter_name):
                        part.to(layer.base_dtype)

    # --- what a branch that is not a matrix cannot do ---------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: all rows of a batch run through the active adapters: call "
                "set_adapter."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "CeRA cannot be merged: its branch is non-linear in x, so no weight matrix equals W0 "
            "plus the branch. Keep the adapter loaded beside the base model, or call unload() to "
            "get the base model back."
        )

    # --- loading ----------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for it before the last name at most; experts' matrices have their parameter's
        # name there.
        for part in CeraLayer.adapter_layer_names:
            head, found, tail = key.partition(f".{part}.{adapter_name}.")
            if found:
                return f"{head}.{part}.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)
