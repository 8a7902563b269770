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

from cera_train.adapters.build import cera_layers
from cera_train.adapters.families.base import ADAPTER
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
    if share := describe_linear_share(
        RunResult.find(subject.folder / "result.json") or RunResult()
    ):
        print_line("linear", share)
    print_line("export", f"{subject}, as {config.format}, to {folder}")
    device = loaded.base.device
    source = config.data or subject.data
    data = prepare_data(source, loaded.tokenizer)
    train, evaluation = (  # of preferences the chosen answers
        TokenizedRows(split.table, numbers=split.numbers[:: source.sequences])
        for split in (data.train, data.evaluation)
    )
    batches = MicroBatches(train, False, config.calibration_tokens, device)
    calibration = batches.load(batches.first(config.calibration_tokens))
    mask = (
        torch.ones_like(calibration.input_ids)
        if calibration.attention_mask is None
        else calibration.attention_mask
    )
    tokens = int(mask.sum())
    announce("fitting", f"linear maps to {tokens:,} training tokens")
    with loaded.context():
        decoder = loaded.base.get_decoder()
        maps = fit_all(
            loaded.model,
            lambda: decoder(**calibration.inputs, use_cache=False),
            mask.flatten().bool(),
        )
    held_out = MicroBatches(evaluation, False, 1, device)  # one row a batch
    rows = [held_out.load([number]) for number in range(len(held_out.lengths))[: config.rows]]

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


def check_export(config: ExportConfig, subject: Subject, loaded: LoadedModel, folder: Path) -> None:
    """Raises UserError for a run that cannot be exported, or a folder that holds anything but an
    earlier export: it would be replaced."""
    run = config.run
    layers = cera_layers(loaded.model)
    if not layers:
        raise UserError(f"run={run} holds no CeRA adapter: what is linear already needs no export.")
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
    if (
        folder.exists()
        and not (folder / CERTIFICATE).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UserError(
            f"output: {folder} holds files that are no export, and would be replaced: choose a "
            f"new folder."
        )


# --- the nearest LoRA -----------------------------------------------------------------------------


def fit(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """M of the linear map of z that is nearest to h, by least squares over the rows, [N, r]
    both."""
    z = z.double()
    h = h.double()
    return h.T @ z @ torch.linalg.pinv(z.T @ z, hermitian=True)


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
            maps[name] = fit(*(rows.flatten(0, -2)[is_token] for rows in (z, h)))
        return z @ maps[name].T.to(z)

    layers = cera_layers(model).items()
    hooks = [
        layer.cera_gate[ADAPTER].register_forward_hook(partial(fit_gate, name))
        for name, layer in layers
    ]
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
        B = layer.cera_B[ADAPTER].weight
        place = f"base_model.model.{name}"
        tensors[f"{place}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"{place}.lora_B.weight"] = (
            (layer.scaling[ADAPTER] * B.double() @ maps[name]).float().cpu().contiguous()
        )
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
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
    memory. Returns the fields of a `Certificate` that come of it."""
    sums = []
    for row in rows:
        counts = row.loss_mask[0, 1:]
        wanted = row.input_ids[0, 1:][counts]
        log_p, log_q = (
            log_softmax(
                model(input_ids=row.input_ids, use_cache=False).logits[0, :-1][counts].float(), -1
            )
            for model in (before, after)
        )
        losses = [-each.gather(1, wanted[:, None]).sum() for each in (log_p, log_q)]
        kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        sums.append(torch.stack([*losses, kl, same.to(kl), counts.sum().to(kl)]).double().cpu())
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


def card(certificate: Certificate, adapter: Path, model: ModelConfig) -> str:
    """The README of an export."""
    what = "A plain model"
    library = "transformers"
    tag = "cera"
    if certificate.format == ExportFormat.lora:
        what = "A LoRA in PEFT's format"
        library = "peft"
        tag = "lora"
    rows = "\n".join(f"| {label} | {value} |" for label, value in certificate.shown().items())
    return (
        f"---\n{card_data(model, library, tag).to_yaml()}\n---\n\n{what}: the linear part of a "
        f"CeRA adapter "
        f"({adapter}), whose gate was replaced by its best linear map.\n\n| | "
        f"|\n|---|---|\n{rows}\n"
    )
