"""Puts CeRA layers into a model, and keeps PEFT's promises that a non-linear branch can keep."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import _get_submodules, get_pattern_key
from torch import nn

from .config import CeraConfig
from .coverage import bypassed_projections, exclude_projections
from .experts import CeraExperts, all_experts, expert_parameters
from .layer import MERGE_REFUSAL, CeraLayer, CeraLinear


class CeraModel(BaseTuner):
    """A model whose targeted projections carry CeRA branches. Built by `peft.get_peft_model`."""

    prefix = "cera_"
    tuner_layer_cls = CeraLayer
    target_module_mapping: ClassVar = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- building ----------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter into the model, as PEFT does. all-linear leaves out the projections that kernels bypass, and
        records them in `exclude_modules`."""
        keep_scale(model)
        config = self.peft_config[adapter_name]
        if str(config.target_modules).lower() == "all-linear":
            exclude_projections(config, bypassed_projections(model), model)
        with warnings.catch_warnings():
            # PEFT looks for patterns among modules; `_prepare_model` has looked among experts' parameters too.
            warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, config: CeraConfig, model_config: dict[str, Any]) -> CeraConfig:
        if config.target_modules is None:
            alone = config.target_parameters
            config.target_modules = [] if alone else self._default_targets(model_config.get("model_type"))
            config.check_contradictions()
        return config

    def _default_targets(self, model_type: str | None) -> set[str] | str:
        """q_proj and v_proj, the paper's; where a model has none, what PEFT takes for LoRA."""
        mapped = self.target_module_mapping.get(model_type)
        names = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        if isinstance(mapped, str):  # an expression for a part of the model, as its language model
            return mapped
        if names >= {"q_proj", "v_proj"}:
            return {"q_proj", "v_proj"}
        if mapped is None:
            raise ValueError(
                f"target_modules=None: a model of type {model_type} has no q_proj and v_proj, and PEFT no default for "
                "it. Name the projections to adapt, or set target_modules='all-linear'."
            )
        return set(mapped)

    def _prepare_model(self, config: CeraConfig, model: nn.Module) -> None:
        """Refuses a pattern or a parameter's name that matches no target, before anything is adapted."""
        experts = [f"{key}.{name}" for key, names in self._targeted_parameters(config, model).items() for name in names]
        if not (config.rank_pattern or config.alpha_pattern):
            return
        config = _maybe_include_all_linear_layers(replace(config), model)
        targets = [name for name, _ in model.named_modules() if self._check_target_module_exists(config, name)]
        targets += experts
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, field)
            unmatched = patterns.keys() - {get_pattern_key(patterns, name) for name in targets}
            if unmatched:
                raise ValueError(
                    f"{field} has {', '.join(map(repr, sorted(unmatched)))}, which matches no target module."
                )

    @staticmethod
    def _check_target_module_exists(config: CeraConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(config, key)
        if found and config.layers_to_transform is not None and key in config.target_modules:
            # PEFT forgets the layers for a module given by its whole name, and all-linear gives whole names.
            config = replace(config, target_modules=[key.rpartition(".")[2]])
            found = "." in key and BaseTuner._check_target_module_exists(config, key)
        return found

    def _check_target_module_compatiblity(self, *args: Any) -> None:
        """Does nothing: PEFT's list of Mamba models is for LoRA. A pass finds what does not run (`coverage`)."""

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
        if isinstance(target, CeraExperts) or expert_parameters(target):
            raise ValueError(f"target module {current_key!r} holds experts: name its parameters in target_parameters.")
        config = config.of_module(current_key)
        if isinstance(target, CeraLayer):
            target.update_layer(adapter_name, config)
            return
        try:
            layer = CeraLinear(target, adapter_name, config)
        except TypeError as error:
            raise ValueError(f"target module {current_key!r} cannot be adapted. {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _targeted_parameters(self, config: CeraConfig, model: nn.Module) -> dict[str, list[str]]:
        """Names of the parameters in target_parameters, by their module's.

        Raises:
            ValueError: a name matches nothing.
        """
        found, matched = defaultdict(list), set()
        for full_name, _ in model.named_parameters():
            if ".cera_" in full_name or not config.target_parameters:
                continue
            key, _, name = full_name.replace(".base_layer.", ".").rpartition(".")
            by = {target for target in config.target_parameters if f".{key}.{name}".endswith(f".{target}")}
            matched |= by
            if by and self._check_target_module_exists(replace(config, target_modules=[key]), key):
                found[key].append(name)
        for target in config.target_parameters or []:
            if target not in matched:
                experts = sorted({f"{key.rpartition('.')[2]}.{name}" for key, name in all_experts(model)})
                there = f"Its experts' are {', '.join(experts)}." if experts else "It has no experts: it is dense."
                raise ValueError(f"target_parameters: {target!r} matches no parameter of this model. {there}")
        return found

    def _inject_parameters(
        self, peft_config: CeraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Puts branches on experts, on all targeted parameters of a module at once."""
        targets = self._targeted_parameters(peft_config, model)
        for key, names in targets.items():
            parent, target, target_name = _get_submodules(model, key)
            configs = {name: peft_config.of_experts(f"{key}.{name}") for name in names}
            try:
                with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                    if isinstance(target, CeraExperts):
                        target.update_layer(adapter_name, configs)
                        continue
                    experts = CeraExperts(target, adapter_name, configs)
            except TypeError as error:
                raise ValueError(f"target_parameters of {key!r} cannot be adapted. {error}") from error
            if adapter_name not in self.active_adapters:
                experts.requires_grad_(False)  # as in `_create_and_replace`
            self._replace_module(parent, target_name, experts, target)
        return [f"{key}.{name}" for key, names in targets.items() for name in names]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's would also assign weights, which fails where it takes trainable tokens out, and move the branch, which
        # the layer has done.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, CeraLayer):
                    layer.cast_to_base_dtype(adapter_name)

    # --- what a branch that is not a matrix cannot do -----------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: all rows of a batch run through the active adapters: call set_adapter.")
        yield

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
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for it before the last name at most; experts' matrices have their parameter's name there.
        for part in CeraLayer.adapter_layer_names:
            head, found, tail = key.partition(f".{part}.{adapter_name}.")
            if found:
                return f"{head}.{part}.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

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
        parts = [f".{part}.{adapter_name}." for part in CeraLayer.adapter_layer_names]
        needed = {key for key in places if any(part in key for part in parts)}
        missing = sorted(needed - set(state_dict))
        # bias="all" saves the biases of a module to save twice, once without the adapter's name.
        whole = ".modules_to_save.", f".modules_to_save.{adapter_name}."
        extra = sorted(
            key for key in state_dict if not {key, key.replace(*whole), key.removeprefix("base_model.model.")} & places
        )
        if missing or extra:
            raise ValueError(
                f"the checkpoint does not fit this CeRA adapter: {len(missing)} tensors missing{_first(missing)}, "
                f"{len(extra)} without a place in the model{_first(extra)}. "
                "Check that it belongs to this base model and to these target_modules."
            )
        return state_dict


def keep_scale(model: nn.Module) -> None:
    """Takes RWKV off the halving of its weights in eval mode: it is for float16, and a branch would not be halved."""
    for module in model.modules():
        if hasattr(module, "_rescale_layers") and module.config.rescale_every > 0:
            if module.layers_are_rescaled:
                mode, module.training = module.training, True
                module._rescale_layers()
                module.training = mode
            module.config.rescale_every = 0


def _first(keys: list[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""
