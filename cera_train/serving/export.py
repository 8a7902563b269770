"""Turns a CeRA adapter into a LoRA or a plain model, and certifies on held-out rows what that
loses.

The hidden units h = gate(z) of a branch are replaced by their best linear map of z = A x on
calibration rows, h ~ M z with M = E[h z^T] E[z z^T]^-1. What is left is a LoRA, B' = s B M.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from cera_train.adapters.families.base import ADAPTER
from cera_train.cera import CeraLayer
from cera_train.common.errors import UserError
from cera_train.common.files import write_folder, write_text
from cera_train.common.terminal import announce, print_fields, print_line
from cera_train.data.prepare import TokenizedRows, prepare_data
from cera_train.distributed.accelerator import quiet_libraries, this_device
from cera_train.evaluation.engine import choose_dtype, load_subject
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.statistics import bootstrap_interval
from cera_train.model.batches import Batch, MicroBatches
from cera_train.model.weights import load_model
from cera_train.runs.card import card_data
from cera_train.runs.records import Record
from cera_train.runs.results import RunResult, describe_linear_share
from cera_train.runs.subject import Subject
from cera_train.settings.data import DataConfig
from cera_train.settings.model import ModelConfig
from cera_train.settings.serving import ExportConfig, ExportFormat

CERTIFICATE = "certificate.json"


class Certificate(Record):
    """The content of certificate.json."""

    format: str
    calibration_tokens: int
    rows: int  # held-out sequences
    tokens: int  # their supervised tokens
    loss_adapter: float  # mean over the supervised tokens, in nats
    loss_export: float
    loss_change: float
    loss_change_lower: float  # 95 % interval of the change, by a paired bootstrap over sequences
    loss_change_upper: float
    kl: float  # mean of KL(adapter || export) over the supervised tokens, in nats
    same_tokens: float  # share of supervised positions where both find the same token likeliest
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.loss_change_upper <= self.tolerance

    def shown(self) -> dict[str, str]:
        """Labels and values."""
        return {
            "fitted": f"to {self.calibration_tokens:,} training tokens",
            "judged on": f"{self.rows:,} held-out rows, {self.tokens:,} supervised tokens",
            "loss": f"{self.loss_adapter:.4f} to {self.loss_export:.4f} nats a token",
            "change": f"{self.loss_change:+.5f}, 95 % interval {self.loss_change_lower:+.5f} to "
            f"{self.loss_change_upper:+.5f} (tolerance {self.tolerance:g})",
            "KL": f"{self.kl:.5f} nats a token",
            "same token": f"{self.same_tokens:.2%} of the likeliest",
        }


def export_adapter(config: ExportConfig, subject: Subject) -> Certificate:
    """Writes the export of a run's adapter, and its certificate. Raises UserError where the run
    cannot be exported or may lose more than `tolerance`; an earlier export then stays as it is."""
    quiet_libraries()
    subject = choose_dtype(subject)
    loaded = load_subject(subject, this_device())
    folder = Path(config.output or subject.folder / f"export_{config.format}")
    check_export(config, subject, loaded, folder)
    result = RunResult.find(subject.folder / "result.json") or RunResult()
    if share := describe_linear_share(result):
        print_line("linear", share)
    print_line("export", f"{subject}, as {config.format}, to {folder}")
    device = loaded.base.device
    source = config.data or subject.data
    data = prepare_data(source, loaded.tokenizer)
    batches = MicroBatches(
        chosen_answers(data.train, source), False, config.calibration_tokens, device
    )
    calibration = batches.load(batches.first(config.calibration_tokens))
    maps = fit_maps(loaded, calibration)
    tokens = int(token_mask(calibration).sum())
    held_out = MicroBatches(chosen_answers(data.evaluation, source), False, 1, device)
    numbers = range(len(held_out.lengths))[: config.rows]
    rows = [held_out.load([number]) for number in numbers]  # one row a batch

    def write(part: Path) -> None:
        write_lora(loaded.model, maps, loaded.base.name_or_path, part)
        exported = peft.PeftModel.from_pretrained(load_model(subject.model, device), part).eval()
        if config.format == ExportFormat.merged:
            exported = exported.merge_and_unload(safe_merge=True)
            for path in part.iterdir():
                path.unlink()
            exported.save_pretrained(part)
        loaded.tokenizer.save_pretrained(part)
        announce("judging", f"the export on {len(rows):,} held-out rows")
        with loaded.context():
            figures = compare_models(loaded.model, exported, rows)
        certificate = Certificate(str(config.format), tokens, tolerance=config.tolerance, **figures)
        print_fields(certificate.shown())
        if not certificate.holds:
            raise UserError(
                f"tolerance={config.tolerance}: the loss may rise by "
                f"{certificate.loss_change_upper:.4f} nats a token, "
                "so nothing is exported. Raise tolerance=, or serve the adapter."
            )
        certificate.write(part / CERTIFICATE)
        write_text(part / "README.md", card(certificate, subject.adapter, subject.model))

    write_folder(folder, write)
    print_fields({"folder": str(folder)})
    return Certificate.read(folder / CERTIFICATE)


def chosen_answers(rows: TokenizedRows, source: DataConfig) -> TokenizedRows:
    """The rows without the rejected answers of preferences."""
    return TokenizedRows(rows.table, numbers=rows.numbers[:: source.sequences])


def check_export(config: ExportConfig, subject: Subject, loaded: LoadedModel, folder: Path) -> None:
    """Raises UserError for a run that cannot be exported, or a folder that holds anything but an
    earlier export: it would be replaced."""
    run = config.run
    layers = cera_layers(loaded.model)
    if not layers:
        raise UserError(f"run={run} holds no CeRA adapter: a linear one needs no export.")
    peft_config = loaded.model.peft_config[ADAPTER]
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "bias"):
        if (value := getattr(peft_config, name)) not in (None, [], {}, "none"):
            raise UserError(
                f"run={run} has {name}={value}: a LoRA of this export has no place for it."
            )
    if loaded.base.get_output_embeddings() in layers.values():
        raise UserError(f"run={run} adapts the head, which is not exported: train without it.")
    if config.data is None and subject.data is None:
        raise UserError(
            f"run={run} is an adapter without its run: name rows to fit and to judge on by "
            f"data=...."
        )
    if not folder.name:
        raise UserError(f"output={folder} needs a name: choose a new folder.")
    is_export = (folder / CERTIFICATE).is_file()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (is_export or is_empty):
        raise UserError(
            f"output: {folder} holds files that are no export, and would be replaced: choose a "
            f"new folder."
        )


# --- the nearest LoRA -----------------------------------------------------------------------------


def cera_layers(model: nn.Module) -> dict[str, CeraLayer]:
    """Every CeRA layer, by its name in the base model."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, CeraLayer)
    }


def fit(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """M of the linear map of z that is nearest to h, by least squares over the rows, [N, r]
    both."""
    z = z.double()
    h = h.double()
    return h.T @ z @ torch.linalg.pinv(z.T @ z, hermitian=True)


def token_mask(batch: Batch) -> torch.Tensor:
    """1 for the tokens of a batch, 0 for its padding."""
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids)
    return batch.attention_mask


def fit_maps(loaded: LoadedModel, calibration: Batch) -> dict[str, torch.Tensor]:
    """M of every branch, fitted to the tokens of a batch."""
    mask = token_mask(calibration)
    announce("fitting", f"linear maps to {int(mask.sum()):,} training tokens")
    decoder = loaded.base.get_decoder()

    def forward() -> None:
        decoder(**calibration.inputs, use_cache=False)

    with loaded.context():
        return fit_all(loaded.model, forward, mask.flatten().bool())


@torch.no_grad()
def fit_all(
    model: nn.Module, forward: Callable[[], object], is_token: torch.Tensor
) -> dict[str, torch.Tensor]:
    """M of every branch, from one pass over the calibration rows: each is fitted to the inputs that
    the maps below give it.

    Args:
        forward: runs the model on the calibration rows, as one batch.
        is_token: marks the positions of the batch that are no padding.
    """
    maps: dict[str, torch.Tensor] = {}

    def fit_gate(
        name: str, gate: nn.Module, inputs: tuple[torch.Tensor], h: torch.Tensor
    ) -> torch.Tensor:
        """As a forward hook: M z in place of gate(z)."""
        [z] = inputs
        if name not in maps:
            maps[name] = fit(z.flatten(0, -2)[is_token], h.flatten(0, -2)[is_token])
        return z @ maps[name].T.to(z)

    hooks = []
    for name, layer in cera_layers(model).items():
        gate = layer.cera_gate[ADAPTER]
        hooks.append(gate.register_forward_hook(partial(fit_gate, name)))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def write_lora(model: nn.Module, maps: dict[str, torch.Tensor], base: str, folder: Path) -> None:
    """Writes the LoRA in PEFT's format.

    Args:
        base: the base model that its config names: a Hub id or a folder.
    """
    tensors = {}
    layers = cera_layers(model)
    for name, layer in layers.items():
        A = layer.cera_A[ADAPTER].weight
        B = layer.scaling[ADAPTER] * layer.cera_B[ADAPTER].weight.double() @ maps[name]
        place = f"base_model.model.{name}"
        tensors[f"{place}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"{place}.lora_B.weight"] = B.float().cpu().contiguous()
    ranks = {name: len(layer.cera_A[ADAPTER].weight) for name, layer in layers.items()}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    peft.LoraConfig(
        r=r,
        lora_alpha=r,  # a scale of 1: s is in B
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


# --- what it loses --------------------------------------------------------------------------------


@torch.no_grad()
def compare_models(before: Any, after: Any, rows: Sequence[Batch]) -> dict[str, Any]:
    """Compares two models on batches of one sequence: no padding, and one sequence's logits in
    memory. Returns the fields of a `Certificate` that result."""
    sums = []
    for row in rows:
        is_supervised = row.loss_mask[0, 1:]
        wanted = row.input_ids[0, 1:][is_supervised, None]
        log_p = log_probabilities(before, row)
        log_q = log_probabilities(after, row)
        loss_before = -log_p.gather(1, wanted).sum()
        loss_after = -log_q.gather(1, wanted).sum()
        kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        tokens = is_supervised.sum()
        row_sums = torch.stack([loss_before, loss_after, kl, same.to(kl), tokens.to(kl)])
        sums.append(row_sums.double().cpu())
    table = torch.stack(sums).numpy()
    loss_before, loss_after, kl, same, tokens = table.sum(0)
    lower, upper = bootstrap_interval(table[:, 1] - table[:, 0], table[:, 4])
    return {
        "rows": len(table),
        "tokens": int(tokens),
        "loss_adapter": loss_before / tokens,
        "loss_export": loss_after / tokens,
        "loss_change": (loss_after - loss_before) / tokens,
        "loss_change_lower": lower,
        "loss_change_upper": upper,
        "kl": kl / tokens,
        "same_tokens": same / tokens,
    }


def log_probabilities(model: Any, row: Batch) -> torch.Tensor:
    """[N, V], after each token before a supervised one."""
    logits = model(input_ids=row.input_ids, use_cache=False).logits[0, :-1]
    return log_softmax(logits[row.loss_mask[0, 1:]].float(), -1)


def card(certificate: Certificate, adapter: Path, model: ModelConfig) -> str:
    """The README of an export."""
    what = "A plain model"
    header = card_data(model, "transformers", "cera")
    if certificate.format == ExportFormat.lora:
        what = "A LoRA in PEFT's format"
        header = card_data(model, "peft", "lora")
    rows = "".join(f"| {label} | {value} |\n" for label, value in certificate.shown().items())
    return (
        f"---\n{header.to_yaml()}\n---\n\n"
        f"{what}: the linear part of a CeRA adapter ({adapter}), whose gate was replaced by its "
        f"best linear map.\n\n"
        f"| | |\n|---|---|\n{rows}"
    )
