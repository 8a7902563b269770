"""One line for a mistake on the command line: the place, the cause and the mend. Arguments that Hydra would take for
something else are checked before it reads them; its own errors are cut to a line, with a suggestion for an unknown
setting. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cera_train.common.errors import UserError
from cera_train.common.files import config_dir
from cera_train.common.settings import keys_of
from cera_train.common.trust import check_config_folder
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.run import Config, PlanRun
from cera_train.settings.serving import ChatConfig, ExportConfig

SCHEMAS = {
    "cera-train": Config,
    "cera-eval": EvalConfig,
    "cera-plan": PlanRun,
    "cera-chat": ChatConfig,
    "cera-export": ExportConfig,
}
ADDED = {"recipe": "", "sweep": "-m ", "study": "-m "}
"""Groups whose files are added with a plus sign, and the flag before it."""

PLUGINS = {
    "hydra/launcher/submitit_local": "pip install -e '.[slurm]' in the clone of cera-train",
    "hydra/launcher/submitit_slurm": "pip install -e '.[slurm]' in the clone of cera-train",
    "hydra/sweeper/optuna": "pip install hydra-optuna-sweeper",
}
"""Files of Hydra's plugins, and how to install them."""

USUAL_NAMES = """
adapter=NAME               peft_type use_dora use_rslora
adapter.r                  rank lora_r lora_rank
adapter.alpha              lora_alpha scaling
adapter.dropout            lora_dropout
adapter.init               init_lora_weights
adapter.target_modules     lora_target lora_target_modules
adapter.layers             layers_to_transform
data=NAME                  dataset dataset_name datasets
data.max_length            max_seq_length sequence_len cutoff_len block_size model_max_length
data.train_files           train_file data_path data_files
data.eval_files            eval_file validation_file
data.train_rows            max_train_samples max_samples
data.eval_rows             max_eval_samples val_set_size
generation.batch_tokens    per_device_eval_batch_size eval_batch_size
launch.processes           num_processes nproc_per_node num_gpus devices
distributed.strategy       fsdp deepspeed ddp
model.path                 model_name_or_path model_name base_model
model.dtype                torch_dtype bf16 fp16 precision
model.quantization         load_in_4bit load_in_8bit
model.attn_implementation  flash_attention
name                       run_name
output_dir                 out_dir save_dir
optimizer=NAME             optim
optimizer.lr               learning_rate
optimizer.schedule         lr_scheduler_type lr_scheduler scheduler
optimizer.warmup_ratio     warmup_steps warmup
optimizer.weight_decay     wd
optimizer.max_grad_norm    gradient_clipping grad_clip
tracker=NAME               report_to use_wandb
train.batch_size           train_batch_size global_batch_size
train.micro_batch_tokens   per_device_train_batch_size micro_batch_size gradient_accumulation_steps grad_accum
train.epochs               num_epochs num_train_epochs
train.max_updates          max_steps num_steps steps
train.eval_every           eval_steps
train.save_every           save_steps
train.keep                 save_total_limit
train.resume               resume_from_checkpoint
train.compile              torch_compile
"""
"""Names that Transformers, PEFT, TRL and axolotl give to a setting of ours."""


def group_folder(group: str) -> Path:
    """The folder of a config group's files."""
    return config_dir("recipes") if group == "recipe" else config_dir("conf") / group


def options(group: str) -> list[str]:
    """The choices of a config group."""
    return sorted(path.stem for path in group_folder(group).glob("*.yaml"))


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """`Did you mean optimizer.lr? ` with a trailing space; empty where no known name is near."""
    word = key.rpartition(".")[2]
    usual = next((ours for ours, *names in map(str.split, USUAL_NAMES.strip().splitlines()) if word in names), "")
    if usual.partition("=")[0] in known:
        return f"Did you mean {usual}? "
    near = [name for name in known if name.rpartition(".")[2] == word]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""


def unknown_setting(key: str, place: str, schema: type) -> str:
    """The line about a key that no setting has, in an argument or a file."""
    program = next(program for program, other in SCHEMAS.items() if other is schema)
    section, names = key.partition(".")[0], [field.name for field in fields(schema)]
    for other in SCHEMAS:
        if section not in names and section in (field.name for field in fields(SCHEMAS[other])):
            return f"{place}: {section} is a setting of {other}, not of {program}. Leave it out."
    near = did_you_mean(key, [*names, *keys_of(schema)])
    return f"{place}: unknown setting {key}. {near}`{program} --help` lists all."


# --- before Hydra ----------------------------------------------------------------------------------------------------


def refuse_arguments(program: str) -> Callable[[str], NoReturn]:
    """An `argparse` error handler: one line, like every other mistake."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (see {program} --help).")

    return refuse


FLAGS = {"--help": "-h", "--multirun": "-m", "--resolve": None, "--shell-completion": "-sc"}
FLAGS_WITH_VALUE = {"--cfg": "-c", "--package": "-p", "--config-dir": "-cd"}
"""Hydra's flags that the commands have, and their short forms."""


def for_hydra(program: str, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra should read them, flags first; a UserError where one is a mistake."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = refuse_arguments(program)
    for name, short in FLAGS.items():
        parser.add_argument(*filter(None, (name, short)), dest=name, action="store_true")
    for name, short in FLAGS_WITH_VALUE.items():
        parser.add_argument(name, short, dest=name, choices=("job", "hydra", "all") if name == "--cfg" else None)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("settings", nargs="*")
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: unknown option: settings take no dashes, key=value (see {program} --help).")
    options = vars(parsed)
    settings = options.pop("settings", [])
    options.pop("debug", None)
    if {"--cfg", "--multirun"} <= options.keys():
        raise UserError(f"--cfg={options['--cfg']} shows one config: leave -m out.")
    if "--config-dir" in options:
        check_config_folder(options["--config-dir"])
    if program == "cera-train" and not settings and not options:
        settings = ["+recipe=quickstart"]
    if "--shell-completion" not in options:
        for setting in settings:
            check_form(program, setting)
    flags = [name if value is True else f"{name}={value}" for name, value in options.items()]
    return [*flags, *map(with_folder_quoted, settings)]


def check_form(program: str, argument: str) -> None:
    """Raises UserError for an argument that is no key=value, or whose plus sign is missing or superfluous."""
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    settings = {field.name for field in fields(SCHEMAS[program])}
    has_recipes = "study" in settings
    if name == "hydra.searchpath":
        raise UserError(f"{argument}: name the folder by --config-dir, where its files are checked.")
    if not (argument.startswith("~") or (name and value)):
        groups = [group for group in ADDED if has_recipes and (group_folder(group) / f"{argument}.yaml").exists()]
        if groups:
            mend = f"write {ADDED[groups[0]]}+{groups[0]}={argument}"
        elif "run" in settings and os.path.isdir(argument):
            mend = f"write run={argument}"
        else:
            mend = f"write {name or 'KEY'}=VALUE without spaces, or quote the whole argument"
        raise UserError(f"{argument or repr(argument)}: expected key=value: {mend}.")
    if name in ADDED and name == key and has_recipes:
        raise UserError(f"{argument}: a {name} is added with a plus sign: write {ADDED[name]}+{argument}.")
    if name in settings - ADDED.keys() and name != key and group_folder(name).is_dir():
        raise UserError(f"{argument}: a file of {name} is chosen without a plus sign: write {name}={value}.")


def with_folder_quoted(argument: str) -> str:
    """Lets run=outputs/rank_lr/adapter=cera,adapter.r=64 be a folder: Hydra would read its commas and signs."""
    key, _, value = argument.partition("=")
    is_folder = any(sign in value for sign in ",=") and "'" not in value and os.path.isdir(value)
    return f"{key}='{value}'" if is_folder else argument


# --- errors of Hydra -------------------------------------------------------------------------------------------------


def explain_composition(error: Exception, program: str, arguments: Sequence[str]) -> str | None:
    """One line for an error of Hydra, OmegaConf or PyYAML; None for another error."""
    match error:
        case OverrideParseException():
            key, _, value = error.override.partition("=")
            return (
                f"{error.override}: cannot read the value: a text needs quotes inside the shell's: '{key}=\"{value}\"'."
            )
        case MissingConfigException():
            group, _, name = error.missing_cfg_file.rpartition("/")
            if error.missing_cfg_file in PLUGINS:
                return f"{group}={name}: a plugin is missing: {PLUGINS[error.missing_cfg_file]}."
            choices = sorted(error.options or options(group))
            return (
                f"{group}={name}: there is no such file. {did_you_mean(name, choices)}There are: {', '.join(choices)}."
            )
        case yaml.MarkedYAMLError() if error.problem_mark is not None:
            return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: broken YAML: {error.problem}."
        # OmegaConf's way to refuse a value in a section that is null
        case AssertionError() if "Unexpected type for root: NoneType" in str(error):
            return _value_in_null([word.partition("=")[0] for word in arguments])
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_hydras = isinstance(error, HydraException | OmegaConfBaseException)
    is_hydras |= frame.f_globals["__name__"].startswith(("hydra.", "omegaconf."))  # it raises others too
    return _describe(error, program, arguments) if is_hydras else None


def _value_in_null(keys: Sequence[str]) -> str:
    """The line about a key such as task.limit without a file for task."""
    sections = {key: key.rpartition(".")[0] for key in keys if "." in key}
    key = next((key for key, section in sections.items() if section not in keys), "")
    return f"{key}: {sections.get(key)} is null here: choose a file for it, {sections.get(key)}=NAME, or set all of it."


def _describe(error: Exception, program: str, arguments: Sequence[str]) -> str:
    """The line about an error that Hydra or OmegaConf raised."""
    cause = next(
        (e for e in (error, error.__cause__, error.__context__) if isinstance(e, OmegaConfBaseException)), None
    )
    message = " ".join(str(error).split())
    not_overridden = re.match("Could not override '([^']+)'", message)
    key = getattr(cause, "full_key", None) or (not_overridden and not_overridden[1])
    if not key:
        return message
    # No attribute of Hydra's exception holds the file in which a key or value stands.
    file = re.search(r"In '([\w./-]+)': \w+ raised while composing", message)
    near = [
        word for word in arguments if re.search(rf"\b{re.escape(key)}\b", word) and ("," not in word or "[" in word)
    ]
    value = getattr(cause, "value", None)
    place = f"{file[1]}.yaml: {key}" if file else (near or [key if value is None else f"{key}={value}"])[0]
    if not_overridden or isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown_setting(key, place, SCHEMAS[program])
    return f"{place}: {str(cause).splitlines()[0].rstrip('.')}."
