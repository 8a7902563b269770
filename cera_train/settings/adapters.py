"""Settings of the adapter. `adapters.families` says what each kind does with them."""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import PositiveFloat, PositiveInt

from cera_train.common.settings import setting
from cera_train.settings.values import NamedValues, Settings, Share, Targets

AdapterKind = StrEnum("AdapterKind", ["cera", "dora", "full", "lora", "peft", "rslora"])
Activation = StrEnum("Activation", ["silu", "relu", "gelu", "tanh", "identity"])
Init = StrEnum("Init", ["kaiming_normal", "kaiming_uniform"])
DropoutOn = StrEnum("DropoutOn", ["hidden", "input"])
Mix = StrEnum("Mix", ["none", "learned"])


@dataclass
class AdapterConfig(Settings):
    kind: AdapterKind = setting(AdapterKind.cera, "result")
    """cera, lora, rslora, dora, peft (any other method of PEFT) or full (every weight, no
    adapter)."""
    r: PositiveInt | None = setting(32, "result")
    """Rank. null: PEFT's default for `kind=peft`; full has none."""
    alpha: PositiveFloat | None = setting(32.0, "result")
    """The branch is scaled by alpha / r (rslora: alpha / sqrt(r)): if alpha is fixed, the best
    learning rate hardly depends on r. null: a scale of 1, or PEFT's for `kind=peft`."""
    dropout: Share = setting(0.0, "result")
    """cera: on the hidden units, after the gate, unless dropout_on=input. The others: PEFT's, on
    the input of A."""
    activation: Activation = setting(Activation.silu, "result")
    """The gate of cera."""
    init: Init = setting(Init.kaiming_normal, "result")
    """How cera draws A. kaiming_normal: variance 2 / d_in, the paper's; kaiming_uniform: 1 / (3
    d_in), as LoRA."""
    dropout_on: DropoutOn = setting(DropoutOn.hidden, "result")
    """Where cera applies dropout. hidden: after the gate, as in the paper; input: to the input of
    A, as PEFT's LoRA does."""
    mix: Mix = setting(Mix.none, "result")
    """learned: cera's hidden units are z + gamma (gate(z) - z), z = A x; gamma, one a module, is
    trained from 0."""
    target_modules: Targets = setting("all-linear", "result")
    """Module names, one regular expression for the whole name, or `all-linear`. null: PEFT's
    default for `kind=peft`; full trains every module."""
    experts: bool = setting(False, "result")
    """cera: adapt all projections of all experts too. false: `all-linear` leaves them out, since
    branches of many experts make up most of an adapter (Qwen3-30B-A3B at r=16: 47 times the
    rest)."""
    method: str | None = setting(None, "result")
    """The PEFT method of `kind=peft`: a name of peft.PeftType, such as MISS."""
    settings: NamedValues = setting(None, "result")
    """Further fields of the PEFT config, such as {init_weights: bat}. null: none."""
    start_from: str | None = setting(None, "result")
    """cera, lora, rslora, dora: the folder of a finished run or of an adapter (RUN/best) whose
    weights a new run starts from, instead of random ones. The optimizer starts anew. null: none."""
    start_digest: str | None = setting(None, "result")
    """Digest of those weights. cera-train fills it in."""
    b_lr_ratio: PositiveFloat = setting(1.0, "result")
    """Ratio of the learning rate of B, and of vectors such as DoRA's magnitudes, to A's. Above 1:
    LoRA+ (arXiv 2402.12354)."""
    label: str | None = setting(None, "nothing")
    """The name in tables and pictures. null: the kind's."""

    def __post_init__(self) -> None:
        # On the command line, null accepts 'adapter.settings={...}'.
        self.settings = self.settings or {}

    @property
    def parameters(self) -> list[str]:
        """Parameters of experts that get a branch, by name."""
        return self.settings.get("target_parameters") or []

    @property
    def places(self) -> str:
        """What is adapted, in a few words; empty if the method decides."""
        targets = self.target_modules or ()
        words = [targets if isinstance(targets, str) else " ".join(targets)]
        words.append("all experts" if self.experts else " ".join(self.parameters))
        return " and ".join(filter(None, words))
