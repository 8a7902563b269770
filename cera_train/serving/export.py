"""Turns a CeRA adapter into a LoRA or a plain model, and certifies what that loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch

from cera_train.adapters.families.base import ADAPTER
from cera_train.common.errors import UserError
from cera_train.common.files import write_folder, write_text
from cera_train.common.terminal import print_fields, print_line
from cera_train.data.prepare import TokenizedRows, prepare_data
from cera_train.distributed.accelerator import quiet_libraries
from cera_train.evaluation.evaluate import evaluate
from cera_train.evaluation.tasks.task import AnswerTask, find_task, load_problems
from cera_train.model.batches import Batch, MicroBatches
from cera_train.model.weights import load_model
from cera_train.serving.certificate import Certificate, card, compare, print_certificate, scores
from cera_train.serving.linear import AffineGate, branches, explained, fit_all, gates_of, replace_gates, write_lora
from cera_train.serving.loading import Loaded, load
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.serving import ExportConfig, ExportFormat

CERTIFICATE = "certificate.json"
REFUSED = "refused.json"
"""Ends the name of the certificate of an export that loses too much. It lies beside the folder, in which an earlier
export may be."""


def export(config: ExportConfig) -> Certificate:
    """Writes the export of a run's adapter, and its certificate.

    Raises:
        UserError: the run cannot be exported, or loses more than `tolerance`: then only the certificate is written,
            beside the folder.
    """
    quiet_libraries()
    loaded = load(config, config.run)
    check(config, loaded)
    folder = Path(config.output or loaded.subject.folder / f"export_{config.format}")
    check_place(folder)
    refused = folder.with_name(f"{folder.name}.{REFUSED}")
    print_line("export", f"{loaded.name}, as {config.format}, to {folder}")
    data = prepare_data(config.data or loaded.subject.run.data, loaded.tokenizer)
    calibration = calibration_batch(data.sample, config.calibration_tokens, loaded.base.device)
    mask = calibration.attention_mask
    tokens = calibration.input_ids.numel() if mask is None else int(mask.sum())
    fit, gates = best_fit(loaded, calibration, config.bias)
    certificates: list[Certificate] = []

    def write_texts(folder: Path, certificate: Certificate) -> None:
        certificate.write(folder / CERTIFICATE)
        write_text(folder / "README.md", card(certificate, loaded.subject.adapter, loaded.subject.model))

    def write(part: Path) -> None:
        write_lora(loaded.model, gates, config.bias, loaded.base.name_or_path, part)
        exported = load_export(config, loaded, part)
        figures = certify(config, loaded, exported, gates, data.evaluation)
        certificate = Certificate(str(config.format), fit, config.bias, tokens, **figures)
        print_certificate(certificate)
        if not certificate.holds:
            certificate.write(refused)
            takes_bias = config.format == ExportFormat.lora and not config.bias
            raise UserError(
                f"tolerance={config.tolerance}: the loss may rise by {certificate.loss_change_upper:.4f} nats a token, "
                f"so nothing is exported but {refused}. Raise tolerance=, {'set bias=true, ' * takes_bias}or serve the "
                "adapter."
            )
        write_texts(part, certificate)
        certificates.append(certificate)

    write_folder(folder, write)
    refused.unlink(missing_ok=True)
    print_fields({"folder": str(folder)})
    (certificate,) = certificates
    if config.task is not None:
        certificate = replace(certificate, accuracy=accuracies(config, loaded, folder))
        print_fields(scores(certificate))
        write_texts(folder, certificate)
    return certificate


def check(config: ExportConfig, loaded: Loaded) -> None:
    """Raises UserError for a run that cannot be exported."""
    subject, run = loaded.subject, config.run
    config.check_model(subject.model)
    if not any(True for _ in branches(loaded.model)):
        raise UserError(f"run={run} holds no CeRA adapter: what is linear already needs no export.")
    peft_config = loaded.model.peft_config[ADAPTER]
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "bias"):
        if getattr(peft_config, name, None) not in (None, [], {}, "none"):
            raise UserError(
                f"run={run} has {name}={getattr(peft_config, name)}: a LoRA of this export has no place for it."
            )
    head = loaded.base.get_output_embeddings()
    if any(layer is head for _, layer in branches(loaded.model)):
        raise UserError(f"run={run} adapts the head, which is not exported: train without it.")
    if config.task is not None and isinstance(find_task(config.task.kind), AnswerTask):
        load_problems(config.task, subject.run.data if subject.run else None)  # before anything takes its time
    if config.data is None and subject.run is None:
        raise UserError(f"run={run} is an adapter without its run: name rows to fit and to judge on by data=....")


def check_place(folder: Path) -> None:
    """Raises UserError for a folder that holds anything but an earlier export: it would be replaced."""
    if not folder.name:
        raise UserError(f"output={folder} needs a name: choose a new folder.")
    if folder.exists() and not (folder / CERTIFICATE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} holds files that are no export, and would be replaced: choose a new folder.")


def calibration_batch(rows: TokenizedRows, max_tokens: int, device: torch.device) -> Batch:
    """The first training rows, of at most `max_tokens` tokens together, as one batch."""
    batches = MicroBatches(rows, False, max_tokens, device)
    return batches.load(batches.first(max_tokens))


def best_fit(loaded: Loaded, calibration: Batch, has_bias: bool) -> tuple[str, dict[str, AffineGate]]:
    """The affine maps, fitted layer by layer or at once: those with the lower loss on the calibration rows."""
    mask = calibration.attention_mask
    is_kept = None if mask is None else mask.flatten().bool()
    decoder, forward = loaded.base.get_decoder(), logits_of(loaded.model, loaded)

    def run() -> None:
        with loaded.autocast:
            decoder(**calibration.inputs, use_cache=False)

    def loss() -> float:
        logits = forward(calibration.input_ids, attention_mask=mask)[:, :-1][calibration.loss_mask[:, 1:]]
        wanted = calibration.input_ids[:, 1:][calibration.loss_mask[:, 1:]]
        return torch.nn.functional.cross_entropy(logits.float(), wanted).item()

    before = gates_of(loaded.model)
    fits = {}
    for fit, layer_by_layer in (("layer by layer", True), ("at once", False)):
        gates = fit_all(loaded.model, run, layer_by_layer, has_bias, is_kept)
        replace_gates(loaded.model, gates)
        fits[fit] = loss(), gates
        replace_gates(loaded.model, before)
    fit = min(fits, key=lambda name: fits[name][0])
    return fit, fits[fit][1]


def logits_of(model: Any, loaded: Loaded) -> Callable[..., torch.Tensor]:
    @torch.no_grad()
    def logits(ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        with loaded.autocast:
            return model(input_ids=ids, use_cache=False, **inputs).logits

    return logits


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


def certify(
    config: ExportConfig, loaded: Loaded, exported: Any, gates: dict[str, AffineGate], held_out: TokenizedRows
) -> dict[str, Any]:
    """What the export loses on the held-out rows, and how much of each branch its map explains there."""
    batches = MicroBatches(held_out, False, 1, loaded.base.device)
    numbers = range(min(config.rows or len(batches.lengths), len(batches.lengths)))
    rows = [(batch.input_ids[0], batch.loss_mask[0]) for batch in (batches.load([number]) for number in numbers)]
    before = logits_of(loaded.model, loaded)
    with explained(loaded.model, gates) as shares:
        figures = compare(before, logits_of(exported, loaded), rows)
    return figures | {"tolerance": config.tolerance, "explained": shares()}


def accuracies(config: ExportConfig, loaded: Loaded, folder: Path) -> dict[str, Any]:
    """The scores of the adapter and of its export on `task`."""
    takes_data = config.task.kind == "perplexity"
    settings = {
        "task": config.task,
        "data": (config.data or loaded.subject.run.data) if takes_data else None,
        "generation": config.generation,
        "trust_remote_code": config.trust_remote_code,
    }
    before = EvalConfig(run=config.run, model=config.model, **settings)
    model = loaded.subject.model  # in the precision of the run, which a LoRA does not record
    if config.format == ExportFormat.merged:
        model = replace(model, path=str(folder))
        after = EvalConfig(run="base", model=model, output_dir=str(folder), **settings)
    else:
        after = EvalConfig(run=str(folder), model=model, **settings)
    return {config.task.name: {"adapter": evaluate(before), "export": evaluate(after)}}
