"""A method of PEFT's kind from outside PEFT: y = (1 + s) W0 x, s [d_out] trained from 0. Importing
it registers it."""

from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from cera_train.cera import add_peft_type


@dataclass
class ScaleConfig(PeftConfig):
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType("OUTSIDE")


class ScaleLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("outside_s",)

    def __init__(self, base_layer, adapter_name):
        super().__init__()
        self.base_layer = base_layer
        self.outside_s = nn.ParameterDict({})
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name):
        self.outside_s[adapter_name] = nn.Parameter(torch.zeros(self.base_layer.out_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, x):
        y = self.base_layer(x)
        if not self.disable_adapters:
            for name in self.active_adapters:
                y = y * (1 + self.outside_s[name])
        return y


class ScaleModel(BaseTuner):
    prefix = "outside_"
    tuner_layer_cls = ScaleLayer

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        layer = ScaleLayer(target, adapter_name)
        self._replace_module(parent, target_name, layer, target)


add_peft_type("OUTSIDE")
register_peft_method(name="outside", config_cls=ScaleConfig, model_cls=ScaleModel)


@dataclass
class UnknownConfig(PeftConfig):
    """Not registered."""
