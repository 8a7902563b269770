"""CeRA adapters in an unpatched vLLM: a gate between the two products of its LoRA, for each token its adapter's.

vLLM computes a LoRA as shrink, z = x A^T, and expand, y += z B^T. CeRA needs y += h B^T, h = z + gamma (gate(z) - z),
and every token of a batch may belong to another adapter: LoRA is the identity gate. Each slot for an adapter holds a
gate's code, and in every projection a gamma, 1 unless it was learned; a step gathers one code a token; expand computes
every gate and keeps the one of the code, so the graph is the same for every batch. On a CPU there is no graph: expand
computes the gates of its batch.

vLLM loads this in each of its processes, through the entry point `vllm.general_plugins`. `REPLACED` lists what it
changes. Where a vLLM lacks one of them, nothing is changed, and LoRA goes on as before.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

logger = logging.getLogger("vllm.cera_train")

GATES = ("identity", "silu", "relu", "gelu", "tanh")
"""The gates by code."""

GAMMA = ".cera_gate.gamma"
"""How the name of a learned gamma ends, among an adapter's weights."""

LORA = GATES.index("identity")
NO_ADAPTER = len(GATES)
"""The code of tokens of the bare base. Their hidden units are zero: vLLM's CPU wrapper reads the last slot's."""

ALL_CODES = (*range(len(GATES)), NO_ADAPTER)


def register() -> None:
    """Teaches the LoRA of vLLM the gates. A second call does nothing."""
    if lacking := [place for place in REPLACED if not _is_there(place)]:
        logger.warning(
            "this vLLM lacks %s, as cera-train knows it: it serves LoRA, and no CeRA adapters.", ", ".join(lacking)
        )
        return
    for place, (replacement, _) in REPLACED.items():
        if replacement is None:
            continue
        owner, name = _owner(place)
        attribute = inspect.getattr_static(owner, name)
        original = getattr(attribute, "__func__", attribute)
        if getattr(original, "replaces", None) is not None:
            return
        replaced = _bind(replacement, original)
        setattr(owner, name, classmethod(replaced) if isinstance(attribute, classmethod) else replaced)


def _bind(replacement: Callable, original: Callable) -> Callable:
    """A function that calls the replacement, which gets the original before its arguments."""

    @functools.wraps(original)
    def replaced(*arguments: Any, **settings: Any) -> Any:
        return replacement(original, *arguments, **settings)

    replaced.replaces = original
    return replaced


# --- an adapter is loaded --------------------------------------------------------------------------------------------


def read_config(original: Callable, cls: type, lora_path: str, max_position_embeddings: int | None, *more: Any) -> Any:
    """`PEFTHelper.from_local_dir`: a CeRA adapter as the LoRA of its shapes, with the code of its gate."""
    config = json.loads((Path(lora_path) / "adapter_config.json").read_text())
    if config.get("peft_type") != "CERA":
        return original(cls, lora_path, max_position_embeddings, *more)
    if config.get("activation") not in GATES:
        raise ValueError(
            f"{lora_path}: activation={config.get('activation')} is no gate that can be served: {', '.join(GATES)}."
        )
    for name, unset in (("target_parameters", ([], None)), ("bias", ("none", None))):
        if config.get(name) not in unset:
            raise ValueError(
                f"{lora_path}: {name}={config[name]} is not served: cera-export makes a LoRA of it, if little is lost."
            )
    ranks = config.get("rank_pattern") or {}
    is_scaled = config.get("alpha") is not None
    helper = cls.from_dict(
        {
            "r": config["r"],
            "lora_alpha": config["alpha"] if is_scaled else config["r"],
            "target_modules": config["target_modules"],
            "modules_to_save": config.get("modules_to_save"),
            "use_rslora": bool(is_scaled and config.get("use_rslora")),
            "rank_pattern": ranks,
            "alpha_pattern": (config.get("alpha_pattern") or {}) if is_scaled else ranks,  # a scale of 1 everywhere
            "vllm_max_position_embeddings": max_position_embeddings,
        }
    )
    helper.cera_gate = GATES.index(config["activation"])
    helper.cera_is_mixed = config.get("mix") == "learned"
    return helper


def parse_name(original: Callable, name: str, *more: Any, **settings: Any) -> tuple[str, bool]:
    """`parse_fine_tuned_lora_name`: CeRA's tensors are called as LoRA's; a gamma has the name of its projection."""
    for part, called in ((".cera_A.", ".lora_A."), (".cera_B.", ".lora_B."), (GAMMA, ".lora_B.weight")):
        name = name.replace(part, called)
    return original(name, *more, **settings)


def keep_gate(original: Callable, cls: type, *arguments: Any, **settings: Any) -> Any:
    """`LoRAModel.from_lora_tensors`: the loaded adapter remembers its gate, and each projection its gamma."""
    from vllm.lora import lora_model

    call = inspect.signature(original).bind(cls, *arguments, **settings)
    tensors, helper = call.arguments["tensors"], call.arguments["peft_helper"]
    call.arguments["tensors"] = {name: tensor for name, tensor in tensors.items() if not name.endswith(GAMMA)}
    model = original(*call.args, **call.kwargs)
    model.cera_gate, model.cera_is_mixed = getattr(helper, "cera_gate", LORA), getattr(helper, "cera_is_mixed", False)
    for name in tensors.keys() - call.arguments["tensors"].keys():
        projection, _ = lora_model.parse_fine_tuned_lora_name(name, call.arguments.get("weights_mapper"))
        model.loras[projection].cera_gamma = tensors[name].item()
    for projection, lora in model.loras.items():
        if model.cera_is_mixed and not hasattr(lora, "cera_gamma"):
            raise ValueError(f"{projection}: mix=learned, and the weights have no gamma of this projection.")
    return model


def merge_slices(original: Callable, manager: Any, adapter: Any) -> None:
    """`_create_merged_loras_inplace`: refuses an adapter whose gate would not act, before it is registered. Gathers the
    gammas of projections that vLLM computes as slices of one."""
    code = getattr(adapter, "cera_gate", LORA)
    adapter.cera_gammas = {}
    if code != LORA:
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            loras = [manager._get_lora_layer_weights(adapter, part) for part in parts]
            gammas = [getattr(lora, "cera_gamma", 1.0) for lora in loras]
            if any(loras) and (reason := _why_no_gate(module, gammas)):
                raise ValueError(f"{name}: {reason}")
            adapter.cera_gammas[name] = gammas
        # A kernel that fuses the two products would ignore the gate, and serve CeRA as linear in silence.
        for wrapper in manager.punica_wrapper_mapping.values():
            if not computes(wrapper, code):
                raise ValueError(
                    f"this vLLM ignores the gate {GATES[code]}: CeRA is not served. Use transformers and PEFT."
                )
        manager._last_mapping = None  # `computes` has overwritten the slots of the tokens
    original(manager, adapter)


def _why_no_gate(module: Any, gammas: list[float]) -> str | None:
    from vllm.lora.layers import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA

    if not _is_projection(module):
        return f"CeRA is served on linear projections, not on {type(module).__name__}. Train without this module."
    is_split = isinstance(module, RowParallelLinearWithLoRA) and module.tp_size > 1
    if is_split and not isinstance(module, RowParallelLinearWithShardedLoRA):
        return (
            "under tensor parallelism each process sees a part of x A^T, and the gate needs the sum: start vLLM with "
            "--fully-sharded-loras."
        )
    if len(gammas) not in (1, len(module.lora_b_stacked)) and len(set(gammas)) > 1:
        return "mix=learned has a gamma for each projection, and this vLLM computes one as several slices."
    return None


def _is_projection(module: Any) -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(module, BaseLinearLayerWithLoRA)


# --- an adapter gets a slot ------------------------------------------------------------------------------------------


def activate(original: Callable, manager: Any, lora_id: int) -> bool:
    """`activate_adapter`: writes the gate's code into the slot that the adapter got."""
    is_new = original(manager, lora_id)
    if is_new:
        slot = manager.lora_index_to_id.index(lora_id)
        adapter = manager._registered_adapters[lora_id]
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.slot_codes[slot] = getattr(adapter, "cera_gate", LORA)
        for name, module in manager.modules.items():
            if _is_projection(module):
                module.lora_b_stacked[0].cera_gammas[slot] = torch.tensor(adapter.cera_gammas.get(name, 1.0))
    return is_new


def set_wrapper(original: Callable, layer: Any, punica_wrapper: Any) -> None:
    """`BaseLayerWithLoRA.set_mapping`: a projection gets its gammas."""
    original(layer, punica_wrapper)
    if _is_projection(layer):
        add_gammas(layer.lora_b_stacked)


def add_gammas(stacked_B: tuple[torch.Tensor, ...]) -> None:
    """Hangs gammas, [slots + 1, slices], on the weights that `add_expand` is called with: it knows no projection. They
    are written in place only, as the codes are."""
    stacked_B[0].cera_gammas = torch.ones(len(stacked_B[0]) + 1, len(stacked_B), device=stacked_B[0].device)


def gated_wrapper(original: Callable, *arguments: Any, **settings: Any) -> Any:
    """`get_punica_wrapper`: the platform's wrapper, with gates."""
    wrapper = original(*arguments, **settings)
    wrapper.__class__ = with_gates(type(wrapper))
    add_gates(wrapper, settings["lora_config"])
    return wrapper


def add_gates(wrapper: Any, lora_config: Any) -> None:
    """Makes a wrapper's codes, written in place only because a captured graph reads them."""
    wrapper.slot_codes = torch.full((lora_config.max_loras + 1,), LORA, device=wrapper.device)
    wrapper.slot_codes[-1] = NO_ADAPTER  # where slot -1 points
    wrapper.token_slots = torch.zeros_like(wrapper._token_lora_indices)
    wrapper.token_codes = torch.full_like(wrapper.token_slots[:, None], LORA)
    wrapper.is_cpu = wrapper.token_codes.is_cpu
    # Made once: the kernels of a GPU keep all weights that they were ever called with.
    shape, dtype = (lora_config.max_loras, 1, lora_config.max_lora_rank, 32), lora_config.lora_dtype
    A = torch.zeros(shape, device=wrapper.device, dtype=dtype)
    wrapper.drawn = (A,), (A.mT.contiguous(),)
    add_gammas(wrapper.drawn[1])


def computes(wrapper: Any, code: int) -> bool:
    """Whether a slot with this code computes h B^T, on random tensors. Overwrites tokens' slots."""
    from vllm.lora.layers import LoRAMapping

    held, gamma = wrapper.slot_codes[0].item(), 0.75
    wrapper.slot_codes[0] = code
    (stacked_A,), (stacked_B,) = wrapper.drawn
    slots, _, rank, width = stacked_A.shape
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(code))
    stacked_A[0, 0], stacked_B[0, 0] = random(rank, width), random(width, rank) / rank
    stacked_B.cera_gammas[0] = gamma
    x = random(8, width).to(stacked_A)
    mapping = LoRAMapping((1,) * len(x), (1,) * len(x), is_prefill=True)
    wrapper.update_metadata(mapping, [1] + [None] * (slots - 1), slots + 1, width)
    y = torch.zeros_like(x)
    wrapper.add_lora_linear(y, x, *wrapper.drawn, 1.0, (width,))
    wrapper.slot_codes[0] = held
    A, B, x = stacked_A[0, 0].float(), stacked_B[0, 0].float(), x.float()
    z = x @ A.T
    wanted = (z + gamma * (formula(GATES[code])(z) - z)) @ B.T
    return torch.allclose(y.float(), wanted, rtol=0, atol=wanted.abs().max().item() * 0.02)


def with_gates(kind: type) -> type:
    """The wrapper of a platform, whose methods a step of vLLM calls for every LoRA product, with gates.

    A graph, compiled or captured, serves every batch, so it has every gate. On a CPU vLLM makes none where there are
    adapters: a step computes the gates of its batch, and for a batch of LoRA none.
    """

    class Gated(kind):
        def update_metadata(self, *arguments: Any, **settings: Any) -> None:
            """Gathers the code of every token's slot."""
            super().update_metadata(*arguments, **settings)
            slots = self.token_lora_indices
            codes = self.slot_codes[slots]
            self.token_slots[: len(slots)] = slots
            self.token_codes[: len(slots), 0] = codes
            if self.is_cpu:  # a GPU would have to wait
                self.batch_codes = tuple(sorted(set(codes.tolist())))

        def add_expand(self, y: torch.Tensor, x: Any, lora_b_stacked: Any, *arguments: Any, **settings: Any) -> Any:
            """y += gate(x) B^T. By now x is whole: gathered, or summed over the processes of tensor parallelism.

            Args:
                x: [slices, tokens, r], or one [tokens, r] a slice.
            """
            among = self.batch_codes if self.is_cpu and not torch.compiler.is_compiling() else ALL_CODES
            if among == (NO_ADAPTER,):
                return None  # nothing to add
            if among != (LORA,):
                tokens = x[0].shape[0]
                codes, slots = self.token_codes[:tokens], self.token_slots[:tokens]
                gammas = lora_b_stacked[0].cera_gammas[slots].T[..., None]
                if isinstance(x, torch.Tensor):
                    x = gate(x, codes, gammas, among)
                else:
                    x = tuple(gate(z, codes, gamma, among) for z, gamma in zip(x, gammas, strict=True))
            return super().add_expand(y, x, lora_b_stacked, *arguments, **settings)

    Gated.__qualname__ = Gated.__name__ = f"Gated{kind.__name__}"
    return Gated


def formula(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return getattr(functional, name) if name != "identity" else torch.positive


def gate(z: torch.Tensor, codes: torch.Tensor, gammas: torch.Tensor, among: tuple[int, ...]) -> torch.Tensor:
    """z + gamma (gate(z) - z) with the gate of each token's code; zero for tokens without an adapter.

    Args:
        z: [..., tokens, r].
        codes: [tokens, 1].
        gammas: [..., tokens, 1].
        among: the codes there are, ascending.
    """
    first, *others = [code for code in among if code != NO_ADAPTER]
    h = formula(GATES[first])(z)
    for code in others:
        h = torch.where(codes == code, formula(GATES[code])(z), h)
    h = torch.lerp(z, h, gammas.to(z.dtype))  # h to the last bit where gamma is 1
    return h.masked_fill(codes == NO_ADAPTER, 0) if NO_ADAPTER in among else h


def hash_with_gates(original: Callable, config: Any) -> str:
    """`LoRAConfig.compute_hash`: graphs compiled without gates are not reused."""
    return f"{original(config)}-cera-{'-'.join(GATES)}-gamma"


# --- what is replaced ------------------------------------------------------------------------------------------------

REPLACED: dict[str, tuple[Callable | None, tuple[str, ...]]] = {
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir": (read_config, ("lora_path", "max_position_embeddings")),
    "vllm.lora.lora_model:parse_fine_tuned_lora_name": (parse_name, ("name",)),
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors": (keep_gate, ("tensors", "peft_helper")),
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace": (merge_slices, ("lora_model",)),
    "vllm.lora.model_manager:LoRAModelManager._get_lora_layer_weights": (None, ("lora_model", "module_name")),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": (activate, ("lora_id",)),
    "vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping": (set_wrapper, ("punica_wrapper",)),
    "vllm.lora.model_manager:get_punica_wrapper": (gated_wrapper, ()),
    "vllm.config.lora:LoRAConfig.compute_hash": (hash_with_gates, ()),
}
"""Where vLLM is changed: what stands there now (None: it is only called), and the parameters that it counts on."""


def _owner(place: str) -> tuple[Any, str]:
    """The module or class, and the name of its attribute."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def _is_there(place: str) -> bool:
    try:
        owner, name = _owner(place)
        parameters = inspect.signature(getattr(owner, name)).parameters
    except (ImportError, AttributeError):
        return False
    return set(REPLACED[place][1]) <= parameters.keys()
