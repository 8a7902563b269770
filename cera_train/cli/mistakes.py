"""One line for a mistake on the command line: the place, the cause and the fix. Hydra's and
OmegaConf's errors are cut to a line, with a suggestion for an unknown setting. Imports no torch."""

import argparse
import difflib
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from cera_train.common.errors import UserError
from cera_train.common.settings import fields_at, fields_of, quoted, require
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.gone import describe_gone
from cera_train.settings.run import Config, PlanRun
from cera_train.settings.serving import ChatConfig, ExportConfig

SCHEMAS = {
    "cera-train": Config,
    "cera-eval": EvalConfig,
    "cera-plan": PlanRun,
    "cera-chat": ChatConfig,
    "cera-export": ExportConfig,
}

USUAL_NAMES = """\
adapter=NAME               peft_type use_dora finetuning_type
adapter.r                  rank lora_r lora_rank
adapter.alpha              lora_alpha
adapter.dropout            lora_dropout
adapter.target_modules     lora_target_modules lora_target lora_target_linear
data=NAME                  dataset dataset_name datasets
data.chat                  template chat_template
data.eval_rows             val_size val_set_size
data.max_length            max_seq_length sequence_len cutoff_len
data.train_files           train_file data_files
hub.push                   push_to_hub hub_model_id
launch.processes           num_processes nproc_per_node num_gpus
model.path                 model_name_or_path base_model
model.dtype                torch_dtype bf16 fp16
model.quantization         load_in_4bit load_in_8bit quantization_bit
optimizer.lr               learning_rate
optimizer.schedule         lr_scheduler_type lr_scheduler
optimizer.warmup_ratio     warmup_steps
tracker=NAME               report_to
train.batch_size           train_batch_size
train.micro_batch_tokens   per_device_train_batch_size gradient_accumulation_steps micro_batch_size
train.epochs               num_epochs num_train_epochs
train.max_updates          max_steps
"""
"""Names that Transformers, PEFT, TRL, axolotl and LLaMA-Factory give to a setting of ours."""


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """`Did you mean optimizer.lr? ` with a trailing space; empty if no known name is similar."""
    word = key.rpartition(".")[2]
    usual = [ours for ours, *names in map(str.split, USUAL_NAMES.splitlines()) if word in names]
    near = [ours for ours in usual if ours.partition("=")[0] in known]
    near = near or [name for name in known if name.rpartition(".")[2] == word]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""


def unknown_setting(key: str, place: str, schema: type) -> str:
    """The message about an unknown key in an argument or a file."""
    near = did_you_mean(
        key, list(dict.fromkeys([*(field.name for field in fields(schema)), *fields_of(schema)]))
    )
    unknown = f"unknown setting {key}. {near}--help lists all."
    return f"{place}: {describe_gone(key) or unknown}"


# --- before Hydra ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other mistake."""
        raise UserError(f"{message} (see {self.prog} --help).")


FLAGS = {
    "-h": "--help",
    "-m": "--multirun",
    "-sc": "--shell-completion",
    "-c": "--cfg",
    "-cd": "--config-dir",
    "--debug": "--debug",
}
"""The flags of the commands by their short forms: Hydra has more."""

WITH_VALUE = ("--cfg", "--config-dir")

OF_GRIDS = ("sweep=", "study=", "sweep.", "hydra.launcher", "hydra.sweeper", "launch.detach=true")
"""Prefixes of settings that mean nothing in a single run."""

OF_ANOTHER_RUN = (
    "model",
    "model.path",
    "train.tasks",
    "data",
    "data.layout",
    "data.path",
    "data.train_files",
    "data.mix",
)
"""Settings that choose a model, data or tasks: with one of them a run is not the quickstart."""


def for_hydra(program: str, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra should read them, flags first. Raises UserError for a mistake."""
    flags: dict[str, str] = {}
    settings = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        name = FLAGS.get(name, name)
        if name in WITH_VALUE:
            flags[name] = f"{name}={value or next(words, '')}"
        elif name in FLAGS.values():
            flags[name] = name
        else:
            fix = f"settings take no dashes, key=value (see {program} --help)."
            require(word[:1] != "-", f"{word}: unknown option: {fix}")
            settings.append(word)
    flags.pop("--debug", None)
    is_single = not flags.keys() - {"--config-dir"}
    is_run = program in ("cera-train", "cera-plan")
    if is_run and flags.keys().isdisjoint(("--help", "--shell-completion")):
        settings = with_quickstart(settings)
    settings = with_implied_files(program, settings)
    if program == "cera-plan" and not is_single:  # a plan does not depend on where jobs will run
        settings = [word for word in settings if not is_of(word, "hydra.launcher")]
    for setting in settings:
        gone = describe_gone(setting)
        require(gone is None, str(gone))
        fix = "add -m to take them all."
        is_unfit = is_single and is_of(setting, *OF_GRIDS)
        require(not is_unfit, f"{setting} is for a grid of runs: {fix}")
    # Of a run, several values without -m are a mistake that Hydra names.
    may_sweep = not is_single or is_run
    return [*flags.values(), *with_texts_quoted(program, settings, may_sweep)]


def is_of(setting: str, *prefixes: str) -> bool:
    return setting.lstrip("+").replace("hydra/", "hydra.").startswith(prefixes)


def with_quickstart(settings: Sequence[str]) -> list[str]:
    """Puts the quickstart's recipe before the settings, unless they name a recipe, a sweep, a
    study, or a model, data or tasks of the user's own."""
    keys = [setting.partition("=")[0] for setting in settings]
    adds_file = any(key.startswith("+") and "." not in key for key in keys)
    is_another = adds_file or not {*keys}.isdisjoint(OF_ANOTHER_RUN)
    return [*settings] if is_another else ["+recipe=quickstart", *settings]


def with_implied_files(program: str, settings: Sequence[str]) -> list[str]:
    """Puts the files of conf/ that the settings imply before them."""
    keys = {setting.partition("=")[0] for setting in settings}
    files = []
    if (
        "model.path" in keys
        and "model" not in keys
        and program in ("cera-eval", "cera-chat", "cera-export")
    ):
        # Any file, because the section is null: the path replaces its facts.
        files.append("model=smollm2_135m")
    is_own = "data.train_files" in keys and keys.isdisjoint({"data", "+recipe", "+sweep", "+study"})
    if is_own and program in ("cera-train", "cera-plan"):
        files.append("data=jsonl")
    return [*files, *settings]


PARSER = OverridesParser.create()


def with_texts_quoted(program: str, settings: Sequence[str], may_sweep: bool = False) -> list[str]:
    """The settings of a command, with quotes around a text that Hydra would read as a number
    (name=2026_11_30, model.revision=7e49710), as several values (prompt='Hello, you'; in a grid
    these may be meant, unless it is a path), or not at all."""
    fields = fields_of(SCHEMAS[program])
    words = []
    for setting in settings:
        key, _, value = setting.partition("=")
        field = fields.get(key.lstrip("+"))
        is_text = field is not None and str in (field.type, *typing.get_args(field.type))
        is_list = field is not None and typing.get_origin(field.type) in (list, dict)
        needs_quotes = is_text and not is_list and changes(setting, may_sweep)
        words.append(f"{key}={quoted(value)}" if needs_quotes else setting)
    return words


def changes(argument: str, may_sweep: bool) -> bool:
    """Whether Hydra reads another text than what was written."""
    try:
        override = PARSER.parse_override(argument)
    except HydraException:
        return True
    text = override.input_line.partition("=")[2]
    if override.is_sweep_override():
        return not may_sweep or os.path.exists(text)
    read = override.value()
    return not (read is None or isinstance(read, str)) and str(read) != text


# --- errors of Hydra ------------------------------------------------------------------------------


def explain_composition(error: Exception, program: str) -> str | None:
    """One line for an error of Hydra, OmegaConf or PyYAML; None for another error."""
    match error:
        case MissingConfigException():
            group, _, name = error.missing_cfg_file.rpartition("/")
            choices = sorted(error.options or ())
            near = did_you_mean(name, choices)
            return f"{group}={name}: there is no such file. {near}There are: {', '.join(choices)}."
        case OverrideParseException():
            fix = "a text needs quotes for Hydra too, as in 'name=\"a b\"'"
            return f"{error.override}: expected key=value, such as adapter.r=16; {fix}."
        case HydraException() | OmegaConfBaseException():
            return _describe(error, SCHEMAS[program])
        case yaml.MarkedYAMLError(problem=problem, problem_mark=yaml.Mark(name=file, line=line)):
            return f"{file}:{line + 1}: broken YAML: {problem}."
        case AssertionError() if "Unexpected type" in str(error):  # OmegaConf's
            words = [word for word in sys.argv[1:] if "." in word.partition("=")[0]]
            return (
                f"{' '.join(words)}: one stands in a section that is null: choose a file for it, "
                "as in task=NAME or -m +study=NAME, or write it as a whole, as in "
                "'data.mix=[{train_files: [a.jsonl]}]'."
            )
    return None


def _describe(error: Exception, schema: type) -> str:
    """Hydra's message without the lines about its types, and OmegaConf's reason; for a setting that
    does not exist, a similar one."""
    lines = [line.strip(" .:") for line in str(error).splitlines() if line[:1] != " "]
    cause = error.__cause__ or error.__context__ or error
    key = getattr(cause, "full_key", None)
    if key and not fields_at(schema, key):
        return unknown_setting(key, lines[0], schema)
    if key:
        lines.append(str(cause).splitlines()[0].rstrip("."))
    return f"{'. '.join(dict.fromkeys(lines))}."
