"""Settings of the adapter. `adapters.families` says what each kind does with them."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cera_train.common.settings import require, require_positive, setting

AdapterKind = StrEnum("AdapterKind", ["cera", "dora", "full", "lora", "peft", "rslora"])
Activation = StrEnum("Activation", ["silu", "relu", "gelu", "tanh", "identity"])
Init = StrEnum("Init", ["kaiming_normal", "kaiming_uniform"])
DropoutOn = StrEnum("DropoutOn", ["hidden", "input"])
Mix = StrEnum("Mix", ["none", "learned"])


@dataclass
class AdapterConfig:
    kind: AdapterKind = setting(AdapterKind.cera, "result")
    """cera, lora, rslora, dora, peft (any other method of PEFT) or full (every weight, no
    adapter)."""
    r: int | None = setting(32, "result")
    """Rank. null: PEFT's default for `kind=peft`; full has none."""
    alpha: float | None = setting(32.0, "result")
    """The branch is scaled by alpha / r (rslora: alpha / sqrt(r)): if alpha is fixed, the best
    learning rate hardly depends on r. null: a scale of 1, or PEFT's for `kind=peft`."""
    dropout: float = setting(0.0, "result")
    """cera: on the hidden units, after the gate, unless dropout_on=input. The others: PEFT's, on
    the input of A."""
    activation: Activation = setting(Activation.silu, "result")
    """The gate of cera."""
    init: Init = setting(Init.kaiming_normal, "result")
    """How cera draws A. kaiming_normal: variance 2 / d_in, the paper's; kaiming_uniform: 1 / (3
    d_in), as LoRA."""
    init_scale: float = setting(1.0, "result")
    """cera draws A this many times as large: the larger A x, the less linear the gate."""
    dropout_on: DropoutOn = setting(DropoutOn.hidden, "result")
    """Where cera applies dropout. hidden: after the gate, as in the paper; input: to the input of
    A, as PEFT's LoRA does."""
    mix: Mix = setting(Mix.none, "result")
    """learned: cera's hidden units are z + gamma (gate(z) - z), z = A x; gamma, one a module, is
    trained from 0."""
    target_modules: Any = setting("all-linear", "result")
    """Module names, one regular expression for the whole name, or `all-linear`. null: PEFT's
    default for `kind=peft`; full trains every module."""
    target_parameters: list[str] | None = setting(None, "result")
    """cera: parameters of experts, such as [mlp.experts.down_proj]: every expert gets a branch.
    null: none."""
    experts: bool = setting(False, "result")
    """cera: adapt all projections of all experts too. false: `all-linear` leaves them out, since
    branches of many experts make up most of an adapter (Qwen3-30B-A3B at r=16: 47 times the
    rest)."""
    expert_r: int | None = setting(None, "result")
    """Rank of an expert's branch. null: r."""
    layers: list[int] | None = setting(None, "result")
    """Only these layers. null: every layer."""
    method: str | None = setting(None, "result")
    """The PEFT method of `kind=peft`: a name of peft.PeftType, such as MISS."""
    settings: Any = setting(None, "result")
    """Further fields of the PEFT config, such as {init_weights: bat}. null: none."""
    start_from: str | None = setting(None, "result")
    """cera, lora, rslora, dora: the folder of a finished run or of an adapter (RUN/best) whose
    weights a new run starts from, instead of random ones. The optimizer starts anew. null: none."""
    start_digest: str | None = setting(None, "result")
    """Digest of those weights. cera-train fills it in."""
    b_lr_ratio: float = setting(1.0, "result")
    """Ratio of the learning rate of B, and of vectors such as DoRA's magnitudes, to A's. Above 1:
    LoRA+ (arXiv 2402.12354)."""
    label: str | None = setting(None, "nothing")
    """The name in tables and pictures. null: the kind's."""

    def __post_init__(self) -> None:
        require(
            self.kind in list(AdapterKind),
            f"adapter.kind={self.kind}: expected one of {', '.join(AdapterKind)}.",
        )
        positive = ("r", "alpha", "init_scale", "b_lr_ratio", "expert_r")
        require_positive("adapter", self, *positive)
        require(
            0 <= self.dropout < 1,
            f"adapter.dropout={self.dropout} must be at least 0 and less than 1.",
        )
        for name in ("layers", "target_parameters"):
            require(
                getattr(self, name) != [],
                f"adapter.{name}=[] adapts nothing: name some, or leave it null.",
            )
        # On the command line, null accepts 'adapter.settings={...}'.
        self.settings = {} if self.settings is None else self.settings
        require(
            isinstance(self.settings, dict) and all(isinstance(key, str) for key in self.settings),
            f"adapter.settings={self.settings!r}: expected names and values, such as "
            f"{{init_weights: bat}}.",
        )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                require(
                    False,
                    f"adapter.target_modules={self.target_modules!r} is not a regular expression: "
                    f"{error}.",
                )

    @property
    def places(self) -> str:
        """What is adapted, in a few words; empty if the method decides."""
        targets = self.target_modules or ()
        words = [targets if isinstance(targets, str) else " ".join(targets)]
        if self.experts or self.target_parameters:
            names = "all experts" if self.experts else " ".join(self.target_parameters)
            words.append(f"{names} at r={self.expert_r or self.r}")
        return " and ".join(filter(None, words))
