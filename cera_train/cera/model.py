"""Puts CeRA layers into a model, and keeps PEFT's promises that a non-linear branch can keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import CeraConfig
from .layer import BASE_ADAPTER, MERGE_REFUSAL, CeraLayer


class CeraModel(BaseTuner):
    """A model whose targeted projections carry CeRA branches. Built by `peft.get_peft_model`."""

    prefix = "cera_"
    tuner_layer_cls = CeraLayer
    target_module_mapping = {}

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)
        self.register_load_state_dict_pre_hook(_refuse_wrong_tensors)

    def _prepare_adapter_config(self, config: CeraConfig, model_config: dict[str, Any]) -> CeraConfig:
        if config.target_modules is None:
            config.target_modules = ["q_proj", "v_proj"]  # the paper's, for every architecture
        return config

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

        def add_names(names: list[str], layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # beam search repeats every row `num_beams` times
            repeats = max(1, len(args[0]) // max(1, len(names)))
            return args, kwargs | {"adapter_names": [name for name in names for _ in range(repeats)]}

        hooks = [
            layer.register_forward_pre_hook(partial(add_names, adapter_names), with_kwargs=True)
            for layer in self.modules()
            if isinstance(layer, (CeraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of branches is not a branch."""
        raise ValueError(
            "CeRA adapters cannot be combined into one: the sum of two non-linear branches is not a branch of that "
            "rank. Make both active instead: model.base_model.set_adapter([...])."
        )


def _refuse_wrong_tensors(model: CeraModel, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Refuses a checkpoint that lacks a tensor of an adapter it holds, or holds one the model has no place for.

    PEFT loads with `strict=False`, since an adapter's checkpoint never has the base weights. A wrong checkpoint would
    then silently evaluate the base model.
    """
    given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    own = set(model.state_dict(keep_vars=True))
    own_cera = {key for key in own if ".cera_A." in key or ".cera_B." in key}
    adapters = {_adapter_of(key) for key in given & own_cera}
    missing = sorted(key for key in own_cera - given if _adapter_of(key) in adapters)
    extra = sorted(given - own)
    if not adapters and not (given & own):
        missing = sorted(own_cera)
    if missing or extra:
        raise ValueError(
            f"the checkpoint does not fit this CeRA adapter: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(extra)} without a place in the model{_first(extra)}. "
            "Check that it belongs to this base model, rank and target_modules."
        )


def _adapter_of(key: str) -> str:
    return key.split(".")[-2]  # ...cera_A.<adapter>.weight


def _first(keys: list[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""
