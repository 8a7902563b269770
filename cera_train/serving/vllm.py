"""CeRA adapters in an unpatched vLLM: a gate between the two products of its LoRA, chosen for each
token by its adapter.

vLLM computes a LoRA as shrink, z = x A^T, and expand, y += z B^T. CeRA needs y += gate(z) B^T, and
the tokens of a batch may belong to different adapters; LoRA is the identity gate. Each slot for an
adapter holds a gate's code; a step gathers one code a token; expand computes every gate and keeps
the one of the code, so the graph is the same for every batch. On a CPU there is no graph: expand
computes only the gates of its batch.

vLLM loads this in each of its processes, through the entry point `vllm.general_plugins`, which is
public; where it computes a LoRA is not. So `REPLACED` lists every function that is replaced or
called, with the parameters that it needs, and where a vLLM lacks one of them, nothing is changed:
it serves LoRA as before. Beside these, three private attributes are read or reset, each with its
reason.
"""

import functools
import inspect
import json
import logging
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cera_train.cera.config import longest_first
from cera_train.cera.gates import GATES as MODULES

logger = logging.getLogger("vllm.cera_train")

GATES = tuple(MODULES)  # the gates by code

LORA = GATES.index("identity")
NO_ADAPTER = len(GATES)
"""The code of tokens of the bare base. Their hidden units are zero: vLLM's CPU wrapper reads the
last slot's."""

ALL_CODES = (*range(len(GATES)), NO_ADAPTER)


def register() -> None:
    """Adds the gates to vLLM's LoRA. A second call does nothing."""
    if lacking := [place for place in REPLACED if not _is_there(place)]:
        logger.warning(
            "this vLLM lacks %s, as cera-train knows it: it serves LoRA, and no CeRA adapters.",
            ", ".join(lacking),
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
        setattr(
            owner, name, classmethod(replaced) if isinstance(attribute, classmethod) else replaced
        )


def _bind(replacement: Callable, original: Callable) -> Callable:
    """A function that calls the replacement with the original as its first argument."""

    @functools.wraps(original)
    def replaced(*arguments: Any, **settings: Any) -> Any:
        return replacement(original, *arguments, **settings)

    replaced.replaces = original
    return replaced


# --- an adapter is loaded -------------------------------------------------------------------------


def read_adapter(
    original: Callable, cls: type, lora_path: str, max_position_embeddings: int | None, *more: Any
) -> Any:
    """`PEFTHelper.from_local_dir`: a CeRA adapter as the LoRA of its shapes, with the code of its
    gate."""
    config = json.loads((Path(lora_path) / "adapter_config.json").read_text())
    if config.get("peft_type") != "CERA":
        return original(cls, lora_path, max_position_embeddings, *more)
    for name, served in (
        ("activation", GATES),
        ("target_parameters", ([], None)),
        ("bias", ("none", None)),
        ("mix", ("none", None)),
    ):
        if config.get(name) not in served:
            raise ValueError(
                f"{lora_path}: {name}={config.get(name)} is not served: cera-export makes a LoRA "
                f"of it, if little is lost."
            )
    ranks = longest_first(config.get("rank_pattern"))
    alphas = longest_first(config.get("alpha_pattern"))
    if (ranks or alphas) and not hasattr(cls, "get_rank_and_scaling"):
        raise ValueError(
            f"{lora_path}: this vLLM ignores rank_pattern and alpha_pattern: install a newer one."
        )
    is_scaled = config.get("alpha") is not None
    if not is_scaled:
        # The scale is 1 where no pattern sets another, and the first that matches decides.
        alphas = alphas | {key: r for key, r in ranks.items() if key not in alphas}
    helper = cls.from_dict(
        {
            "r": config["r"],
            "lora_alpha": config["alpha"] if is_scaled else config["r"],
            "target_modules": config["target_modules"],
            "modules_to_save": config.get("modules_to_save"),
            "use_rslora": bool(is_scaled and config.get("use_rslora")),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "vllm_max_position_embeddings": max_position_embeddings,
        }
    )
    helper.cera_gate = GATES.index(config["activation"])
    return helper


def parse_name(original: Callable, name: str, *more: Any, **settings: Any) -> tuple[str, bool]:
    """`parse_fine_tuned_lora_name`: CeRA's tensors by the names of LoRA's."""
    name = name.replace(".cera_A.", ".lora_A.").replace(".cera_B.", ".lora_B.")
    return original(name, *more, **settings)


def keep_gate(original: Callable, cls: type, *arguments: Any, **settings: Any) -> Any:
    """`LoRAModel.from_lora_tensors`: the loaded adapter remembers its gate."""
    model = original(cls, *arguments, **settings)
    helper = inspect.signature(original).bind(cls, *arguments, **settings).arguments["peft_helper"]
    model.cera_gate = getattr(helper, "cera_gate", LORA)
    return model


def check_gate(original: Callable, manager: Any, adapter: Any) -> None:
    """`_create_merged_loras_inplace`: refuses an adapter whose gate would not act, before it is
    registered."""
    code = getattr(adapter, "cera_gate", LORA)
    if code != LORA:
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            is_adapted = any(manager._get_lora_layer_weights(adapter, part) for part in parts)
            if is_adapted and (why := _why_no_gate(module)):
                raise ValueError(f"{name}: {why}")
        # A kernel that fuses the two products would ignore the gate, and silently serve CeRA as
        # linear.
        for wrapper in manager.punica_wrapper_mapping.values():
            if not computes(wrapper, code):
                raise ValueError(
                    f"this vLLM ignores the gate {GATES[code]}: CeRA is not served. Use "
                    f"transformers and PEFT."
                )
        # `computes` has overwritten the slots of the tokens: else the next batch would keep them
        manager._last_mapping = None
    original(manager, adapter)


def _why_no_gate(module: Any) -> str | None:
    from vllm.lora.layers import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    if not isinstance(module, BaseLinearLayerWithLoRA):
        return (
            f"CeRA is served on linear projections, not on {type(module).__name__}. Train without "
            f"this module."
        )
    is_split = isinstance(module, RowParallelLinearWithLoRA) and module.tp_size > 1
    if is_split and not isinstance(module, RowParallelLinearWithShardedLoRA):
        return (
            "under tensor parallelism each process sees a part of x A^T, and the gate needs the "
            "sum: start vLLM with --fully-sharded-loras."
        )
    return None


# --- an adapter gets a slot -----------------------------------------------------------------------


def activate(original: Callable, manager: Any, lora_id: int) -> bool:
    """`activate_adapter`: writes the gate's code into the slot that the adapter got."""
    is_new = original(manager, lora_id)
    if is_new:
        slot = manager.lora_index_to_id.index(lora_id)
        adapter = manager.get_adapter(lora_id)
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.slot_codes[slot] = getattr(adapter, "cera_gate", LORA)
    return is_new


def gated_wrapper(original: Callable, *arguments: Any, **settings: Any) -> Any:
    """`get_punica_wrapper`: the platform's wrapper, with gates. Its codes are written in place
    only, because a captured graph reads them."""
    wrapper = original(*arguments, **settings)
    lora_config = settings["lora_config"]
    wrapper.__class__ = with_gates(type(wrapper))
    wrapper.slot_codes = torch.full((lora_config.max_loras + 1,), LORA, device=wrapper.device)
    wrapper.slot_codes[-1] = NO_ADAPTER  # where slot -1 points
    # as long as a batch may be; the public `token_lora_indices` is as long as the last batch
    wrapper.token_codes = torch.full_like(wrapper._token_lora_indices[:, None], LORA)
    wrapper.is_cpu = wrapper.token_codes.is_cpu
    # Made once: the kernels of a GPU keep all weights that they were ever called with.
    shape = (lora_config.max_loras, 1, lora_config.max_lora_rank, 32)
    dtype = lora_config.lora_dtype
    A = torch.zeros(shape, device=wrapper.device, dtype=dtype)
    wrapper.drawn = (A,), (A.mT.contiguous(),)
    return wrapper


def computes(wrapper: Any, code: int) -> bool:
    """Whether a slot with this code computes gate(x A^T) B^T, on random tensors. Overwrites tokens'
    slots."""
    from vllm.lora.layers import LoRAMapping

    held = wrapper.slot_codes[0].item()
    wrapper.slot_codes[0] = code
    (stacked_A,), (stacked_B,) = wrapper.drawn
    slots, _, rank, width = stacked_A.shape
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(code))
    stacked_A[0, 0] = random(rank, width)
    stacked_B[0, 0] = random(width, rank) / rank
    x = random(8, width).to(stacked_A)
    mapping = LoRAMapping((1,) * len(x), (1,) * len(x), is_prefill=True)
    wrapper.update_metadata(mapping, [1] + [None] * (slots - 1), slots + 1, width)
    y = torch.zeros_like(x)
    wrapper.add_lora_linear(y, x, *wrapper.drawn, 1.0, (width,))
    wrapper.slot_codes[0] = held
    A = stacked_A[0, 0].float()
    B = stacked_B[0, 0].float()
    x = x.float()
    wanted = formula(GATES[code])(x @ A.T) @ B.T
    return torch.allclose(y.float(), wanted, rtol=0, atol=wanted.abs().max().item() * 0.02)


def with_gates(kind: type) -> type:
    """The wrapper of a platform, whose methods a step of vLLM calls for every LoRA product, with
    gates.

    A graph, compiled or captured, serves every batch, so it has every gate. On a CPU vLLM makes
    no graph where there are adapters, so a step computes only the gates of its batch: none for a
    batch of LoRA.
    """

    class Gated(kind):
        def update_metadata(self, *arguments: Any, **settings: Any) -> None:
            """Gathers the code of every token's slot."""
            super().update_metadata(*arguments, **settings)
            codes = self.slot_codes[self.token_lora_indices]
            self.token_codes[: len(codes), 0] = codes
            if self.is_cpu:  # a GPU would have to wait
                self.batch_codes = tuple(sorted(set(codes.tolist())))

        def add_expand(self, y: torch.Tensor, x: Any, *arguments: Any, **settings: Any) -> Any:
            """y += gate(x) B^T. By now x is whole: gathered, or summed over the processes of tensor
            parallelism.

            Args:
                x: [slices, tokens, r], or one [tokens, r] a slice.
            """
            is_graph = not self.is_cpu or torch.compiler.is_compiling()
            among = ALL_CODES if is_graph else self.batch_codes
            if among == (NO_ADAPTER,):
                return None  # nothing to add
            if among != (LORA,):
                codes = self.token_codes[: x[0].shape[0]]
                if isinstance(x, torch.Tensor):
                    x = gate(x, codes, among)
                else:
                    x = tuple(gate(z, codes, among) for z in x)
            return super().add_expand(y, x, *arguments, **settings)

    Gated.__qualname__ = Gated.__name__ = f"Gated{kind.__name__}"
    return Gated


def formula(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return getattr(functional, name) if name != "identity" else torch.positive


def gate(z: torch.Tensor, codes: torch.Tensor, among: tuple[int, ...]) -> torch.Tensor:
    """The gate of each token's code; zero for tokens without an adapter.

    Args:
        z: [..., tokens, r].
        codes: [tokens, 1].
        among: the codes there are, ascending.
    """
    first, *others = [code for code in among if code != NO_ADAPTER]
    h = formula(GATES[first])(z)
    for code in others:
        h = torch.where(codes == code, formula(GATES[code])(z), h)
    return h.masked_fill(codes == NO_ADAPTER, 0) if NO_ADAPTER in among else h


def hash_with_gates(original: Callable, config: Any) -> str:
    """`LoRAConfig.compute_hash`: graphs compiled without gates are not reused."""
    return f"{original(config)}-cera-{'-'.join(GATES)}"


# --- what is replaced -----------------------------------------------------------------------------

REPLACED: dict[str, tuple[Callable | None, tuple[str, ...]]] = {
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir": (
        read_adapter,
        ("lora_path", "max_position_embeddings"),
    ),
    "vllm.lora.lora_model:parse_fine_tuned_lora_name": (parse_name, ("name",)),
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors": (keep_gate, ("tensors", "peft_helper")),
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace": (
        check_gate,
        ("lora_model",),
    ),
    "vllm.lora.model_manager:LoRAModelManager._get_lora_layer_weights": (
        None,
        ("lora_model", "module_name"),
    ),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": (activate, ("lora_id",)),
    "vllm.lora.model_manager:get_punica_wrapper": (gated_wrapper, ()),
    "vllm.config.lora:LoRAConfig.compute_hash": (hash_with_gates, ()),
}
"""Where vLLM is changed: what stands there now (None: it is only called), and the parameters that
it counts on."""


def _owner(place: str) -> tuple[Any, str]:
    """The module or class, and the name of its attribute."""
    module, _, path = place.partition(":")
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{owner}"), name


def _is_there(place: str) -> bool:
    try:
        parameters = inspect.signature(pkgutil.resolve_name(place)).parameters
    except (ImportError, AttributeError):
        return False
    return set(REPLACED[place][1]) <= parameters.keys()
