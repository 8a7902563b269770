"""Rows of a probe, and the oracle of its spectra: the outputs of a branch, by calling the layer and
its base."""

import torch
from peft.tuners.lora import LoraLayer

ROWS = [list(range(3, 40)), list(range(100, 120)), list(range(200, 260, 2))]
MASKS = [[False] + [True] * (len(row) - 1) for row in ROWS]


def forward_of(model):
    return lambda batch: model(**batch.inputs, use_cache=False)


def branch_outputs(model, name: str) -> torch.Tensor:
    """What the adapter adds at one module, [tokens, d_out]: the module's output minus its base
    layer's."""
    layer = model.get_submodule(f"base_model.model.{name}")
    inputs = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.eval()
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
        hook.remove()
        x = torch.cat([values[0] for values in inputs])
        base = layer.base_layer(x)
        if isinstance(layer, LoraLayer) and layer.use_dora["default"]:
            # DoRA rescales the rows of W0 + s B A to its magnitude m; what that does to W0 x is not
            # the branch.
            weight = layer.base_layer.weight + layer.get_delta_weight("default")
            base = base * layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1)
        outputs = (layer(x) - base).double()
    model.train()
    return outputs
