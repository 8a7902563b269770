"""What you deploy is what you trained: a folder is loaded as its user loads it, by transformers or
PEFT alone, by a vLLM, or a GGUF by llama.cpp, and compared with the run on held-out rows.

Ids of tokens, the chat template and the end tokens must be equal, since no loss shows them. Logits
may differ by what rounding explains: the limit is on KL(run || folder), which has no sign to
cancel, and varies less than a difference of losses.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer

from cera_train.adapters.folder import ADAPTER_CONFIG, check_saved
from cera_train.adapters.saved import is_adapter
from cera_train.common.errors import DiffersError
from cera_train.common.settings import Choice, require
from cera_train.common.terminal import announce, print_fields
from cera_train.common.user_code import user_code
from cera_train.data.prepare import prepare_evaluation
from cera_train.data.tokens import ids_of, stop_ids
from cera_train.evaluation.engine import load_subject
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.server import Server
from cera_train.model.batches import Batch, MicroBatches
from cera_train.model.folder import from_hub_or_folder, load_architecture
from cera_train.model.language_model import LanguageModel
from cera_train.model.weights import auto_class, load_model, quantization_of
from cera_train.runs.records import Record
from cera_train.runs.subject import Subject
from cera_train.serving.llama_cpp import GGUF, LlamaCpp
from cera_train.settings.data import DataConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization
from cera_train.settings.serving import ExportConfig
from cera_train.verdicts.interval import bootstrap_interval

SAME = 1e-6
"""Nats per token that the order of float32 sums explains."""

TIMES = 3
"""Times what rounding changes in a run that rounding explains: both round at different places."""

FITTED = 0.01
"""Nats per token that a LoRA fitted to another method may lose."""

CERA = "CERA"
"""The one method that a plain model is fitted to: no matrix is its branch."""

DTYPES = {
    "ALL_F32": Dtype.float32,
    "MOSTLY_F16": Dtype.float16,
    "MOSTLY_BF16": Dtype.bfloat16,
}
"""What a GGUF that is not quantised says of its weights."""


class Certificate(Record):
    """How far a folder is from its run: the content of certificate.json."""

    form: str
    rows: int  # held-out sequences
    tokens: int  # their supervised tokens
    loss_run: float  # mean over the supervised tokens, in nats
    loss_form: float
    kl: float  # mean of KL(run || deployed) over the supervised tokens, in nats
    kl_lower: float  # 95 % interval, by a bootstrap over sequences; the mean itself of one
    kl_upper: float
    at_most: float
    reason: str  # for at_most

    @property
    def holds(self) -> bool:
        return self.kl_upper <= self.at_most

    def shown(self) -> dict[str, str]:
        """Labels and values."""
        interval = "and no interval from one row"
        if self.rows > 1:
            interval = f"95 % interval {self.kl_lower:.6f} to {self.kl_upper:.6f}"
        return {
            "form": self.form,
            "judged on": f"{self.rows:,} held-out rows, {self.tokens:,} supervised tokens",
            "loss": f"{self.loss_run:.4f} to {self.loss_form:.4f} nats a token",
            "KL": f"{self.kl:.6f} nats a token, {interval}",
            "at most": f"{self.at_most:.6f}: {self.reason}",
        }


Engine = LoadedModel | LlamaCpp | Server
"""What computes a run or its export."""


class Folder(LoadedModel):
    """A folder in transformers and PEFT alone."""

    fix = "Copy the tokenizer of the run."

    def ids_of(self, text: str) -> list[int]:
        return ids_of(text, self.tokenizer)

    def has_template_of(self, tokenizer: Any) -> bool:
        ours = (self.tokenizer.chat_template, self.tokenizer.eos_token)
        return ours == (tokenizer.chat_template, tokenizer.eos_token)

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends after this token."""
        stops = self.base.generation_config.eos_token_id
        if is_adapter(self.model):  # its folder has no place for generation settings
            return token in stop_ids(self.tokenizer, stops)
        return token in (stops if isinstance(stops, list) else [stops])


class Deployed(NamedTuple):
    """A folder or a file as its user runs it."""

    engine: Folder | Server | LlamaCpp
    kind: str  # for the certificate
    ends: set[int]  # at which its files let an answer end
    dtype: Dtype | None  # of its base; None: a plain model that is quantised
    method: str | None = None  # of its adapter


def verify(
    folder: Path,
    subject: Subject,
    reference: LoadedModel,
    data: DataConfig,
    config: ExportConfig,
) -> Certificate:
    """Compares a folder with the run that it was made of, and prints how far it is. Errors name no
    folder.

    Args:
        folder: or a GGUF file.
        subject: the run, whose dtype is chosen, and `reference`, its model.
        data: whose held-out rows are scored, the first `config.rows` of them.
        config: also the limit, and the address of a vLLM that loads the folder too, and whose
            answers are judged.

    Raises:
        DiffersError: the folder is not the run.
        UserError: the folder cannot be loaded.
    """
    announce("loading", "it as its user does")
    rows = prepare_evaluation(data, reference.tokenizer, config.rows)
    held_out = MicroBatches(rows, False, 1, reference.base.device)
    batches = [held_out.load([number]) for number in range(len(rows))]  # one row a batch
    if folder.suffix == GGUF:
        longest = max(row.input_ids.shape[1] for row in batches)
        deployed = open_gguf(folder, reference, longest)
    else:
        deployed = open_folder(folder, subject.model, reference.base.device, config.server)
    at_most = config.at_most
    require(
        at_most is not None or deployed.dtype is not None,
        "it is quantised, which is no rounding of the run: set at_most=.",
    )
    check_tokens(reference, deployed, batches)
    announce("judging", f"it on {len(rows):,} held-out rows")
    figures = compare_models(reference, deployed.engine, batches)
    allowed = Choice(at_most, "at_most")
    if at_most is None:
        allowed = explained(subject, reference, deployed, batches)
    certificate = Certificate(
        form=deployed.kind,
        **figures,
        at_most=allowed.value,
        reason=allowed.why,
    )
    print_fields(certificate.shown())
    if not certificate.holds:
        raise DiffersError(
            f"its KL divergence from the run may be {certificate.kl_upper:.2g} nats a token, "
            f"above at_most={allowed.value:.2g} ({allowed.why}). Export it anew, or raise at_most=."
        )
    return certificate


# --- a folder, as its user loads it ---------------------------------------------------------------


def open_folder(
    folder: Path, model: ModelConfig, device: torch.device, server: str | None
) -> Deployed:
    """A folder in transformers, or in a vLLM that computes 16 bits where it does not say."""
    loaded = load_folder(folder, model, device)
    dtype = Dtype(str(loaded.base.dtype).removeprefix("torch."))
    quantization = quantization_of(loaded.base)
    kind = "a plain model"
    method = method_of(loaded)
    if method is not None:
        kind = f"PEFT's {method}, on its base"
    engine = loaded
    if server is None:
        kind += f" in {quantization or dtype}"
    else:
        engine = Server(server, model, loaded.tokenizer, folder)
        kind += f", in {engine.version}"
        dtype = Dtype.bfloat16
    if quantization is not None and method is None:
        dtype = None
    ends = stop_ids(loaded.tokenizer, loaded.base.generation_config.eos_token_id)
    return Deployed(engine, kind, ends, dtype, method)


def open_gguf(file: Path, reference: LoadedModel, longest: int) -> Deployed:
    """A GGUF in llama.cpp, for sequences of at most `longest` tokens."""
    engine = LlamaCpp(file, reference.tokenizer, longest)
    kind = f"a GGUF in llama.cpp, {engine.precision}"
    return Deployed(engine, kind, engine.named_ends, DTYPES.get(engine.precision))


def load_folder(folder: Path, model: ModelConfig, device: torch.device) -> Folder:
    """The model of a folder by `from_pretrained` alone, with the tokenizer beside it. An adapter's
    base is the one that the folder names, quantised as in training. The libraries only warn of
    tensors that are missing or of no use: the logits show them."""
    is_there = (folder / "tokenizer_config.json").is_file()
    require(is_there, "it holds no model with its tokenizer: name the folder of one.")
    place = replace(model, path=str(folder), revision=None)
    cannot = ("it cannot be loaded", "Export it anew.")
    with user_code(*cannot):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    if (folder / ADAPTER_CONFIG).is_file():
        saved = check_saved(folder)
        path = saved.get("base_model_name_or_path")
        require(isinstance(path, str), f"{ADAPTER_CONFIG} names no base model: export it anew.")
        named = replace(place, path=path, revision=saved.get("revision"))
        is_whole = model.quantization == Quantization.none
        base = load_plain(named, device) if is_whole else load_model(named, device)
        with user_code(*cannot), warnings.catch_warnings(action="ignore"):
            loaded = peft.PeftModel.from_pretrained(base, str(folder))
    else:
        base = loaded = load_plain(place, device, use_safetensors=True)
    return Folder(LanguageModel(loaded, base).eval(), tokenizer)


def load_plain(model: ModelConfig, device: torch.device, **settings: Any) -> Any:
    """A model by `from_pretrained` alone."""
    kind = auto_class(load_architecture(model))
    return from_hub_or_folder(kind.from_pretrained, model, device_map={"": device}, **settings)


# --- what no loss shows ---------------------------------------------------------------------------


def check_tokens(reference: LoadedModel, deployed: Deployed, rows: Sequence[Batch]) -> None:
    """Raises DiffersError for another chat template, other end tokens, or a held-out row in other
    tokens."""
    engine = deployed.engine
    if not engine.has_template_of(reference.tokenizer):
        raise DiffersError(f"its chat template or end token is not that of the run. {engine.fix}")
    ends = stop_ids(reference.tokenizer, reference.base.generation_config.eos_token_id)
    others = {end for end in ends | deployed.ends if engine.ends_at(end)}
    if ends != others:
        raise DiffersError(
            f"its answers stop at the tokens {sorted(others)}, those of the run at "
            f"{sorted(ends)}: set eos_token_id={sorted(ends)} in generation_config.json. "
            f"{engine.fix}"
        )
    for number, row in enumerate(rows, start=1):
        text = reference.tokenizer.decode(row.input_ids[0])
        if engine.ids_of(text) != ids_of(text, reference.tokenizer):
            raise DiffersError(f"it writes held-out row {number} in other tokens. {engine.fix}")


# --- logits ---------------------------------------------------------------------------------------


@torch.no_grad()
def compare_models(reference: LoadedModel, engine: Engine, rows: Sequence[Batch]) -> dict[str, Any]:
    """Compares both on batches of one sequence: no padding, and one sequence's logits in memory.
    Returns the fields of a `Certificate` that result."""
    sums = []
    for row in rows:
        is_supervised = row.loss_mask[0, 1:]
        wanted = row.input_ids[0, 1:][is_supervised, None]
        log_p = log_probabilities(reference, row)
        log_q = log_probabilities(engine, row)
        if log_p.shape != log_q.shape or not log_q.isfinite().all():
            raise DiffersError(
                f"its logits, of {log_q.shape[1]:,} tokens, are not finite, or not of the "
                f"{log_p.shape[1]:,} tokens of the run: export it anew."
            )
        loss_run = -log_p.gather(1, wanted).sum()
        loss_form = -log_q.gather(1, wanted).sum()
        kl = kl_div(log_q, log_p, reduction="sum", log_target=True).clamp(min=0)  # of rounding
        row_sums = torch.stack([loss_run, loss_form, kl, is_supervised.sum().to(kl)])
        sums.append(row_sums.double().cpu())
    table = torch.stack(sums).numpy()
    loss_run, loss_form, kl, tokens = table.sum(0)
    kl_lower, kl_upper = bootstrap_interval(table[:, 2], table[:, 3])
    return {
        "rows": len(table),
        "tokens": int(tokens),
        "loss_run": loss_run / tokens,
        "loss_form": loss_form / tokens,
        "kl": kl / tokens,
        "kl_lower": kl_lower,
        "kl_upper": kl_upper,
    }


def log_probabilities(engine: Engine, row: Batch) -> torch.Tensor:
    """[N, V], after each token before a supervised one."""
    if not isinstance(engine, LoadedModel):
        ids = row.input_ids[0].tolist()
        places = row.loss_mask[0].nonzero()[:, 0].tolist()
        found = [engine.log_probabilities(ids[:place]) for place in places if place > 0]
        return torch.stack(found).to(row.input_ids.device)
    with engine.language_model.autocast():
        logits = engine.model(input_ids=row.input_ids, use_cache=False).logits[0, :-1]
    return log_softmax(logits[row.loss_mask[0, 1:]].float(), -1)


# --- what may differ ------------------------------------------------------------------------------


def method_of(loaded: LoadedModel) -> str | None:
    """The method of an adapter, by its type in PEFT. None: there is no adapter."""
    return loaded.model.active_peft_config.peft_type.value if is_adapter(loaded.model) else None


def explained(
    subject: Subject, reference: LoadedModel, deployed: Deployed, rows: Sequence[Batch]
) -> Choice[float]:
    """The KL divergence that is no fault of an export, in nats a token, and its cause. What its
    precision changes is measured on the run itself."""
    value = SAME
    reasons = []
    method = method_of(reference)
    exact = {method} if method == CERA else {method, None}
    if deployed.method not in exact:
        value += FITTED
        reasons.append(f"{FITTED} for the fit of a LoRA")
    other = other_precision(subject, reference, deployed)
    if other is not None:
        announce("measuring", "what rounding changes in the run itself")
        subject = replace(subject, model=other)
        if not is_adapter(reference.model):  # its folder is that of a plain model
            model = replace(other, path=str(subject.adapter), revision=None)
            subject = replace(subject, model=model, adapter=None)
        rounded = load_subject(subject, reference.base.device)
        if other.dtype == Dtype.float32:
            # without autocast, also where the run sets it
            rounded = replace(rounded, language_model=LanguageModel(rounded.model, rounded.base))
        value += TIMES * compare_models(reference, rounded, rows)["kl_upper"]
        reasons.append(f"{TIMES} times what rounding changes in the run itself")
    return Choice(value, " and ".join(reasons) or "the order of float32 sums")


def other_precision(
    subject: Subject, reference: LoadedModel, deployed: Deployed
) -> ModelConfig | None:
    """The run's base in a precision in which it differs from the run as an export does. None where
    both compute in float32."""
    model = subject.model
    rounded = None if deployed.dtype == Dtype.float32 else replace(model, dtype=deployed.dtype)
    computes = model.autocast_dtype(subject.train.autocast, reference.base.device.type == "cuda")
    is_exact = computes is None and model.dtype == Dtype.float32
    has_float32_weights = not is_adapter(reference.model)
    if is_exact or (has_float32_weights and rounded is not None):
        return rounded
    return replace(model, dtype=Dtype.float32)
