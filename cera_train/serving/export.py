"""Turns a CeRA adapter into a LoRA or a plain model, and certifies on held-out rows what that loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
from torch.nn.functional import kl_div, log_softmax

from cera_train.adapters.build import cera_layers
from cera_train.adapters.families.base import ADAPTER
from cera_train.common.errors import UserError
from cera_train.common.files import write_folder, write_text
from cera_train.common.terminal import announce, print_fields, print_line
from cera_train.data.prepare import TokenizedRows, prepare_data
from cera_train.data.sources import decide_layouts
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.model.batches import Batch, MicroBatches
from cera_train.model.weights import load_model
from cera_train.runs.card import card_data
from cera_train.runs.records import Record
from cera_train.runs.results import RunResult, describe_linear_share
from cera_train.serving.linear import fit_all, write_lora
from cera_train.serving.loading import Loaded, load
from cera_train.settings.model import ModelConfig
from cera_train.settings.serving import ExportConfig, ExportFormat

CERTIFICATE = "certificate.json"


class Certificate(Record):
    """The content of certificate.json."""

    format: str
    calibration_tokens: int
    rows: int
    """Held-out sequences."""
    tokens: int
    """Their supervised tokens."""
    loss_adapter: float
    """Mean loss of a supervised token in nats."""
    loss_export: float
    loss_change: float
    loss_change_lower: float
    """95 % interval of the change, by a paired bootstrap over sequences."""
    loss_change_upper: float
    kl: float
    """Mean of KL(adapter || export) over the supervised tokens, in nats."""
    same_tokens: float
    """Share of supervised positions where both find the same token likeliest."""
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


def export(config: ExportConfig) -> Certificate:
    """Writes the export of a run's adapter, and its certificate. Raises UserError where the run cannot be exported or
    may lose more than `tolerance`; an earlier export then stays as it is."""
    quiet_libraries()
    loaded = load(config, config.run)
    folder = Path(config.output or loaded.subject.folder / f"export_{config.format}")
    check(config, loaded, folder)
    if share := describe_linear_share(RunResult.find(loaded.subject.folder / "result.json") or RunResult()):
        print_line("linear", share)
    print_line("export", f"{loaded.name}, as {config.format}, to {folder}")
    data = prepare_data(decide_layouts(config.data or loaded.subject.run.data), loaded.tokenizer)
    calibration, tokens = calibration_batch(data.sample, config.calibration_tokens, loaded.base.device)
    announce("fitting", f"linear maps to {tokens:,} training tokens")
    maps = fit_maps(loaded, calibration)

    def write(part: Path) -> None:
        write_lora(loaded.model, maps, loaded.base.name_or_path, part)
        exported = load_export(config, loaded, part)
        rows = held_out_rows(data.evaluation, config.rows, loaded.base.device)
        announce("judging", f"the export on {len(rows):,} held-out rows")
        figures = compare(logits_of(loaded.model, loaded), logits_of(exported, loaded), rows)
        certificate = Certificate(str(config.format), tokens, tolerance=config.tolerance, **figures)
        print_fields(certificate.shown())
        if not certificate.holds:
            raise UserError(
                f"tolerance={config.tolerance}: the loss may rise by {certificate.loss_change_upper:.4f} nats a token, "
                "so nothing is exported. Raise tolerance=, or serve the adapter."
            )
        certificate.write(part / CERTIFICATE)
        write_text(part / "README.md", card(certificate, loaded.subject.adapter, loaded.subject.model))

    write_folder(folder, write)
    print_fields({"folder": str(folder)})
    return Certificate.read(folder / CERTIFICATE)


def check(config: ExportConfig, loaded: Loaded, folder: Path) -> None:
    """Raises UserError for a run that cannot be exported, or a folder that holds anything but an earlier export: it
    would be replaced."""
    run, layers = config.run, cera_layers(loaded.model)
    config.check_model(loaded.subject.model)
    if not layers:
        raise UserError(f"run={run} holds no CeRA adapter: what is linear already needs no export.")
    peft_config = loaded.model.peft_config[ADAPTER]
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "bias"):
        if (value := getattr(peft_config, name)) not in (None, [], {}, "none"):
            raise UserError(f"run={run} has {name}={value}: a LoRA of this export has no place for it.")
    if loaded.base.get_output_embeddings() in layers.values():
        raise UserError(f"run={run} adapts the head, which is not exported: train without it.")
    if config.data is None and loaded.subject.run is None:
        raise UserError(f"run={run} is an adapter without its run: name rows to fit and to judge on by data=....")
    if not folder.name:
        raise UserError(f"output={folder} needs a name: choose a new folder.")
    if folder.exists() and not (folder / CERTIFICATE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} holds files that are no export, and would be replaced: choose a new folder.")


def calibration_batch(rows: TokenizedRows, max_tokens: int, device: torch.device) -> tuple[Batch, int]:
    """The first training rows as one batch of at most `max_tokens` tokens, and the number of tokens."""
    batches = MicroBatches(rows, False, max_tokens, device)
    batch = batches.load(batches.first(max_tokens))
    return batch, batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())


def fit_maps(loaded: Loaded, calibration: Batch) -> dict[str, torch.Tensor]:
    """The linear map of every branch, fitted to the calibration rows."""
    mask, decoder = calibration.attention_mask, loaded.base.get_decoder()

    def forward() -> None:
        with loaded.autocast:
            decoder(**calibration.inputs, use_cache=False)

    return fit_all(loaded.model, forward, None if mask is None else mask.flatten().bool())


def load_export(config: ExportConfig, loaded: Loaded, folder: Path) -> Any:
    """The LoRA in a folder on a fresh base, by PEFT; merged, where that is the format, and then in its place."""
    base = load_model(loaded.subject.model, loaded.base.device)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    if config.format == ExportFormat.merged:
        model = model.merge_and_unload(safe_merge=True)
        for path in folder.iterdir():
            path.unlink()
        model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return model


def held_out_rows(
    rows: TokenizedRows, count: int | None, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and loss mask of each of the first rows, [T] both."""
    batches = MicroBatches(rows, False, 1, device)
    loaded = (batches.load([number]) for number in range(len(batches.lengths))[:count])
    return [(batch.input_ids[0], batch.loss_mask[0]) for batch in loaded]


def logits_of(model: Any, loaded: Loaded) -> Callable[[torch.Tensor], torch.Tensor]:
    """ids [1, T] -> logits [1, T, V], in the precision of the run."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with loaded.autocast:
            return model(input_ids=ids, use_cache=False).logits

    return logits


@torch.no_grad()
def compare(
    before: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[torch.Tensor], torch.Tensor],
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, Any]:
    """Compares two models, sequence by sequence: no padding, and one sequence's logits in memory.

    Args:
        before, after: ids [1, T] -> logits [1, T, V].
        rows: ids and loss mask of each sequence, [T] both.

    Returns:
        The fields of a `Certificate` that come of it.
    """
    sums = []
    for ids, mask in rows:
        counts, wanted = mask[1:], ids[1:][mask[1:]]
        log_p, log_q = (log_softmax(model(ids[None])[0, :-1][counts].float(), -1) for model in (before, after))
        losses = [-each.gather(1, wanted[:, None]).sum() for each in (log_p, log_q)]
        kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        sums.append(torch.stack([*losses, kl, same.to(kl), counts.sum().to(kl)]).double().cpu())
    table = torch.stack(sums).numpy()
    loss_before, loss_after, kl, same, tokens = table.sum(0)
    lower, upper = interval_of_ratio(table[:, 1] - table[:, 0], table[:, 4])
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


def interval_of_ratio(values: numpy.ndarray, weights: numpy.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(values) / sum(weights), resampled over the rows."""
    from scipy.stats import bootstrap

    if len(values) == 1:  # scipy takes two rows or more
        return (float(values[0] / weights[0]),) * 2
    interval = bootstrap(
        (values, weights),
        lambda values, weights, axis: values.sum(axis) / weights.sum(axis),
        **{"paired": True, "method": "percentile", "n_resamples": 10_000, "batch": 100, "rng": 0},
    ).confidence_interval
    return float(interval.low), float(interval.high)


def card(certificate: Certificate, adapter: Path, model: ModelConfig) -> str:
    """The README of an export."""
    what, library, tag = "A plain model", "transformers", "cera"
    if certificate.format == ExportFormat.lora:
        what, library, tag = "A LoRA in PEFT's format", "peft", "lora"
    rows = "\n".join(f"| {label} | {value} |" for label, value in certificate.shown().items())
    return (
        f"---\n{card_data(model, library, tag).to_yaml()}\n---\n\n{what}: the linear part of a CeRA adapter "
        f"({adapter}), whose gate was replaced by its best linear map.\n\n| | |\n|---|---|\n{rows}\n"
    )
