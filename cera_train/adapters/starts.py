"""Starts of LoRA (`init_lora_weights`) that W0 alone does not give again, and what they leave on
disk.

eva: A spans the inputs' main directions, and the modules share out the ranks. corda, lora_ga,
pissa_niter_N: a part s B0 A0 of W0 moves into the adapter, by the covariance of the inputs, the
gradient of W0, or a random SVD.

What is saved is a plain LoRA beside the untouched W0, which needs neither rows nor the start:
s [B, -B0] [A; A0] of rank 2 r where a part moved. A resumed run splits it again.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.utils import broadcast, broadcast_object_list
from peft.tuners.lora import LoraLayer, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import transpose
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.families.base import ADAPTER, FROM_ROWS, passing_start
from cera_train.cera.coverage import is_linear
from cera_train.common.settings import require

MOST_PASSES = 100
"""Passes over its rows in which EVA has to converge."""


@dataclass(frozen=True)
class StartRows:
    """The rows that a start reads, and passes of the base over them.

    Args:
        sequences: numbers of the rows.
        supervised: supervised tokens of every row of the split.
        load: a padded batch of rows.
        losses: [N] losses of a batch's supervised tokens, by the base.
    """

    sequences: list[int]
    supervised: Sequence[int]
    load: Callable[[list[int]], Any]
    losses: Callable[[Any], torch.Tensor]

    def each(self) -> Iterator[Any]:
        """One row a batch: PEFT's covariance takes no padding."""
        for sequence in self.sequences:
            yield self.load([sequence])

    def groups(self, tokens: int) -> list[list[int]]:
        """Rows that together have at least so many supervised tokens."""
        groups: list[list[int]] = [[]]
        for sequence in self.sequences:
            if sum(self.supervised[row] for row in groups[-1]) >= tokens:
                groups.append([])
            groups[-1].append(sequence)
        if len(groups) > 1 and sum(self.supervised[row] for row in groups[-1]) < tokens:
            groups[-2] += groups.pop()
        return groups


def attach_started(
    base: PreTrainedModel,
    config: peft.PeftConfig,
    rows: StartRows | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """`peft.get_peft_model` for any config. A start from rows reads `rows`, or the adapter of a
    checkpoint of its run; without either, as in a plan, the adapter starts as a plain LoRA."""
    start = passing_start(config)
    if start is None:
        return peft.get_peft_model(base, config)
    has_rows = rows is not None or start not in FROM_ROWS
    if has_rows and checkpoint is None:
        return STARTS.get(start, start_at_random)(base, config, rows)
    config.init_lora_weights = True
    if start == "eva" and checkpoint is not None:
        saved = peft.LoraConfig.from_pretrained(checkpoint)
        for name in ("rank_pattern", "alpha_pattern", "target_modules"):
            setattr(config, name, getattr(saved, name))
    model = peft.get_peft_model(base, config)
    config.init_lora_weights = start
    return model


def check_shards(config: peft.PeftConfig | None) -> None:
    """Raises UserError for a start where the base's weights are sharded."""
    start = passing_start(config)
    require(
        start is None,
        f"adapter.settings.init_lora_weights={start} needs whole weights in each process: set "
        "distributed.strategy=ddp.",
    )


# --- the starts -----------------------------------------------------------------------------------


def start_by_inputs(
    base: PreTrainedModel, config: peft.LoraConfig, rows: StartRows
) -> peft.PeftModel:
    """EVA, arXiv 2410.07170, by PEFT."""
    model = peft.get_peft_model(base, config)
    ranks = [config.r, *config.rank_pattern.values()]
    # PEFT skips batches of fewer tokens than directions, for ever if all are.
    tokens = math.ceil(max(ranks) * config.eva_config.rho)
    batches = [rows.load(group) for group in rows.groups(tokens)]
    count = min(int(_tokens_of(batch, config).sum()) for batch in batches)
    require(
        count >= tokens,
        f"adapter.start_rows={len(rows.sequences)}: they have {count} supervised tokens, and EVA "
        f"at this rank needs {tokens}. Raise adapter.start_rows, or lower adapter.r.",
    )
    passes = iter(range(MOST_PASSES * len(batches)))

    def forward(_: nn.Module, batch: Any) -> None:
        require(
            next(passes, None) is not None,
            f"EVA has not converged in {MOST_PASSES} passes over adapter.start_rows="
            f"{len(rows.sequences)} rows. Raise it, or lower adapter.settings.eva_config.tau.",
        )
        rows.losses(batch)

    directions = get_eva_state_dict(
        model,
        batches,
        forward_fn=forward,
        prepare_model_inputs_fn=_tokens_of,
        prepare_layer_inputs_fn=lambda inputs, tokens, name: inputs[0][tokens],
        gather_distributed_inputs=False,  # every process reads all of the rows
        show_progress_bar=False,
    )
    [directions] = broadcast_object_list([directions])
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    return model


def _tokens_of(batch: Any, config: peft.LoraConfig) -> torch.Tensor:
    """The tokens of a batch, [B, T], whose inputs EVA takes."""
    if config.eva_config.use_label_mask:
        return batch.loss_mask
    mask = batch.attention_mask
    return torch.ones_like(batch.loss_mask) if mask is None else mask.bool()


def start_by_covariance(
    base: PreTrainedModel, config: peft.LoraConfig, rows: StartRows
) -> peft.PeftModel:
    """CorDA, arXiv 2406.05223, by PEFT. Raises UserError without attrs, which PEFT imports and does
    not require."""
    require(
        importlib.util.find_spec("attr") is not None,
        "adapter.settings.init_lora_weights=corda: PEFT's CorDA needs the package attrs: "
        "pip install attrs.",
    )
    from peft.tuners.lora.corda import preprocess_corda  # fails without attrs

    def run() -> None:
        for batch in rows.each():
            rows.losses(batch)

    config = _for_whole_weights(base, config)
    preprocess_corda(base, config, run)
    for module in base.modules():
        if eigens := getattr(module, "eigens", None):
            for name in ("U_WC", "S_WC", "V_WC"):
                setattr(eigens, name, broadcast(getattr(eigens, name).contiguous()))
    return _moved_part(base, config)


def start_by_gradient(
    base: PreTrainedModel, config: peft.LoraConfig, rows: StartRows
) -> peft.PeftModel:
    """LoRA-GA, arXiv 2407.05000, by PEFT."""

    def run() -> None:
        for batch in rows.each():
            rows.losses(batch).mean().backward()

    config = _for_whole_weights(base, config)
    config.lora_ga_config = config.lora_ga_config or peft.LoraGAConfig()
    preprocess_loraga(base, config, run)
    r = max([config.r, *config.rank_pattern.values()])
    for name, module in base.named_modules():
        gradient = getattr(module, "_peft_loraga_grad", None)
        if gradient is not None:
            broadcast(gradient)
            # Of fewer directions PEFT would make a B with fewer columns than A has rows.
            require(
                2 * r <= min(module.weight.shape),
                f"adapter.r={r}: LoRA-GA takes 2 r directions of a gradient, and {name} has "
                f"{min(module.weight.shape)}. Lower adapter.r, or leave the module out.",
            )
    return _moved_part(base, config)


def start_at_random(
    base: PreTrainedModel, config: peft.LoraConfig, rows: StartRows | None
) -> peft.PeftModel:
    """PiSSA by a fast SVD, by PEFT, which would make another one to load the adapter."""
    return _moved_part(base, config)


STARTS = {"eva": start_by_inputs, "corda": start_by_covariance, "lora_ga": start_by_gradient}


def _for_whole_weights(base: PreTrainedModel, config: peft.LoraConfig) -> peft.LoraConfig:
    """The config with the names of its targets, which PEFT's passes over rows need."""
    start = config.init_lora_weights
    require(
        not getattr(base, "is_quantized", False),
        f"adapter.settings.init_lora_weights={start} moves a part of W0, and quantised weights do "
        "not take it: set model.quantization=none, or start with eva.",
    )
    return _maybe_include_all_linear_layers(config, base)


def _moved_part(base: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """The base with an adapter that takes a part of W0, and remembers it."""
    weights = {module: module.weight.data for module in base.modules() if is_linear(module)}
    model = peft.get_peft_model(base, config)
    for name, layer in lora_layers(model).items():
        require(
            layer.get_base_layer() in weights,
            f"adapter.settings.init_lora_weights={config.init_lora_weights} takes a part of linear "
            f"projections alone: leave {name} out of adapter.target_modules.",
        )
        # PEFT has put another tensor in the place of W0: the same subtraction as in a resumed run
        # gives the same bytes.
        layer.get_base_layer().weight.data = weights[layer.get_base_layer()]
        A0 = layer.lora_A[ADAPTER].weight.detach().clone()
        B0 = layer.lora_B[ADAPTER].weight.detach().clone()
        take_part(layer, A0, B0)
    return model


# --- on disk --------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers by the names of their weights in a file, without `.lora_A.weight`."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def take_part(layer: LoraLayer, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """Takes s B0 A0 out of the weight of a layer's base, and keeps both for `write_plain`."""
    layer.start = (A0, B0)  # not a buffer: PEFT would save it
    W = layer.get_base_layer().weight
    part = layer.scaling[ADAPTER] * (B0.float() @ A0.float())
    W.data = (W.data.float() - transpose(part, layer.fan_in_fan_out)).to(W.dtype)


def write_plain(model: nn.Module, folder: Path) -> None:
    """Turns the adapter that PEFT has written into a folder into a plain LoRA."""
    start = passing_start(model.peft_config[ADAPTER])
    if start is None:
        return
    config = peft.LoraConfig.from_pretrained(folder)
    if start != "eva":
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for name, layer in lora_layers(model).items():
            A0, B0 = layer.start
            A = tensors[f"{name}.lora_A.weight"]
            B = tensors[f"{name}.lora_B.weight"]
            tensors[f"{name}.lora_A.weight"] = torch.cat([A, A0.to(A)])
            tensors[f"{name}.lora_B.weight"] = torch.cat([B, -B0.to(B)], 1)
        save_file(tensors, path, {"format": "pt"})
        # s = alpha / r, or alpha / sqrt(r), stays as it was
        factor = math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
        config.lora_alpha *= factor
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {
            name: factor * alpha for name, alpha in config.alpha_pattern.items()
        }
    config.init_lora_weights = True
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.save_pretrained(folder)


def split_plain(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes A0 and B0 out of the weights that `write_plain` wrote, and their product out of the
    base's weights; returns A and B."""
    if passing_start(model.peft_config[ADAPTER]) in (None, "eva"):
        return weights
    weights = dict(weights)
    for name, layer in lora_layers(model).items():
        if not {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= weights.keys():
            continue  # `load` refuses it
        A, A0 = weights[f"{name}.lora_A.weight"].chunk(2)
        B, minus_B0 = weights[f"{name}.lora_B.weight"].chunk(2, 1)
        weights |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if not hasattr(layer, "start"):
            take_part(layer, A0, -minus_B0)
    return weights
