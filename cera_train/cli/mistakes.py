"""One line for a mistake on the command line: the place, the cause and the fix. Hydra's and
OmegaConf's errors are cut to a line, with a suggestion for an unknown setting. Imports no torch."""

import argparse
import difflib
import json
import os
import re
import shlex
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from cera_train.common.errors import UserError
from cera_train.common.files import options
from cera_train.common.settings import fields_at, fields_of, quoted, require, section_of
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

USUAL_NAMES = """
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
    usual = [
        ours for ours, *names in map(str.split, USUAL_NAMES.strip().splitlines()) if word in names
    ]
    near = [ours for ours in usual if ours.partition("=")[0] in known]
    near = near or [name for name in known if name.rpartition(".")[2] == word]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""


def unknown_setting(key: str, place: str, schema: type) -> str:
    """The message about an unknown key in an argument or a file."""
    program = next(program for program, other in SCHEMAS.items() if other is schema)
    near = did_you_mean(
        key, list(dict.fromkeys([*(field.name for field in fields(schema)), *fields_of(schema)]))
    )
    return f"{place}: unknown setting {key}. {near}`{program} --help` lists all."


# --- before Hydra ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other mistake."""
        raise UserError(f"{message} (see {self.prog} --help).")


FLAGS = [
    ("--help", "-h"),
    ("--multirun", "-m"),
    ("--shell-completion", "-sc"),
    ("--resolve",),
    ("--debug",),
]
SHOW_CHOICES = ("--help", "--shell-completion")
FLAGS_WITH_VALUE = [("--cfg", "-c"), ("--package", "-p"), ("--config-dir", "-cd")]
"""The flags of the commands: Hydra has more."""

OF_GRIDS = ("sweep=", "study=", "sweep.", "hydra.launcher", "hydra.sweeper", "launch.detach=true")
"""Prefixes of settings that mean nothing in a single run."""

OF_LAUNCHER = re.compile(r"\+{0,2}hydra[/.]launcher[.=]")

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
    parser = Parser(program, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for names in [*FLAGS, *([("--look",)] if program == "cera-train" else [])]:
        parser.add_argument(*names, dest=names[0], action="store_true")
    for names in FLAGS_WITH_VALUE:
        parser.add_argument(*names, dest=names[0])
    parser.add_argument("settings", nargs="*")
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(
            f"{unknown[0]}: unknown option: settings take no dashes, key=value (see {program} "
            f"--help)."
        )
    flags = vars(parsed)
    settings = flags.pop("settings", [])
    flags.pop("--debug", None)
    if flags.pop("--look", False) and "--multirun" in flags:
        raise UserError("--look: it shows the rows of one run: leave out -m.")
    if program in ("cera-train", "cera-plan") and flags.keys().isdisjoint(SHOW_CHOICES):
        settings = with_quickstart(settings)
    settings = with_implied_files(program, settings)
    check_sections(program, settings)
    is_single = not flags.keys() - {"--config-dir"}
    if program == "cera-plan" and not is_single:  # a plan does not depend on where jobs will run
        settings = [setting for setting in settings if not OF_LAUNCHER.match(setting)]
    for setting in settings:
        key = setting.partition("=")[0]
        if gone := describe_gone(setting) or describe_gone(key):
            raise UserError(gone)
        if is_single and setting.lstrip("+").replace("hydra/", "hydra.").startswith(OF_GRIDS):
            raise UserError(f"{setting} is for a grid of runs: add -m to take them all.")
    words = [name if value is True else f"{name}={value}" for name, value in flags.items()]
    # Of a run, several values without -m are a mistake that Hydra names.
    may_sweep = not is_single or program in ("cera-train", "cera-plan")
    return [*words, *with_texts_quoted(program, settings, may_sweep)]


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


def check_sections(program: str, settings: Sequence[str]) -> None:
    """Raises UserError for a setting in a section that is null because no file is chosen for it."""
    pairs = [setting.partition("=")[::2] for setting in settings]
    with_file = {key.lstrip("+") for key, value in pairs if not value.startswith("{")}
    for setting, (key, _) in zip(settings, pairs, strict=True):
        section = key.lstrip("+~").partition(".")[0]
        file = "-m +study=NAME" if section == "study" else f"{section}=NAME"
        require(
            section not in null_sections(SCHEMAS[program]) or section in with_file,
            f"{setting}: the section {section} is null here: choose a file for it, {file}.",
        )


def null_sections(schema: type) -> list[str]:
    """The sections of a command that are null unless a file is chosen for them."""
    hints = typing.get_type_hints(schema)
    return [
        field.name
        for field in fields(schema)
        if field.default is None and section_of(hints[field.name]) is not None
    ]


PARSER = OverridesParser.create()


def with_texts_quoted(program: str, settings: Sequence[str], may_sweep: bool = False) -> list[str]:
    """The settings of a command, with quotes where Hydra would read a text otherwise."""
    schema = SCHEMAS[program]
    return [with_text_quoted(setting, schema, may_sweep) for setting in settings]


def with_text_quoted(argument: str, schema: type, may_sweep: bool) -> str:
    """Quotes a text that Hydra would read as a number (name=2026_11_30, model.revision=7e49710), as
    several values (prompt='Hello, you'; in a grid these may be meant, unless it is a path), or not
    at all."""
    key, _, value = argument.partition("=")
    field = fields_of(schema).get(key.lstrip("+"))
    is_text = field is not None and is_text_type(field.type)
    return f"{key}={quoted(value)}" if is_text and changes(argument, may_sweep) else argument


def is_text_type(annotation: Any) -> bool:
    is_collection = typing.get_origin(annotation) in (list, dict)
    return not is_collection and str in (annotation, *typing.get_args(annotation))


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
        case OverrideParseException():
            key, is_assigned, value = error.override.partition("=")
            fix = "expected key=value, without spaces, such as adapter.r=16 or +recipe=NAME"
            if is_assigned:
                example = shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")
                fix = f"cannot read the value: a text needs quotes for Hydra too, as in {example}"
            return f"{error.override}: {fix}."
        case MissingConfigException():
            group, _, name = error.missing_cfg_file.rpartition("/")
            choices = sorted(error.options or options(group))
            is_plugin = group.startswith("hydra/")
            plugin = "Is its plugin of Hydra installed? " if is_plugin else ""
            near = did_you_mean(name, choices)
            return (
                f"{group}={name}: there is no such file. {near}{plugin}There are: "
                f"{', '.join(choices)}."
            )
        case yaml.MarkedYAMLError() if error.problem_mark is not None:
            return (
                f"{error.problem_mark.name}:{error.problem_mark.line + 1}: broken YAML: "
                f"{error.problem}."
            )
        case HydraException() | OmegaConfBaseException():
            return _describe(error, SCHEMAS[program])
        case AssertionError() if "Unexpected type" in str(error):  # OmegaConf's
            return (
                "a setting stands inside a section that is null, such as data.mix: write the "
                "section as a whole, as in 'data.mix=[{train_files: [a.jsonl]}]', or in a file of "
                "conf/."
            )
    return None


def _describe(error: Exception, schema: type) -> str:
    """Hydra's message without the lines about its types, and OmegaConf's reason; for a setting that
    does not exist, a similar one."""
    first, *others = [line.strip(" .:") for line in str(error).splitlines() if line[:1] != " "]
    cause = error.__cause__ or error.__context__ or error
    key = getattr(cause, "full_key", None)
    if key and not fields_at(schema, key):
        return unknown_setting(key, first, schema)
    reason = [str(cause).splitlines()[0].rstrip(".")] if key and cause is not error else []
    return f"{'. '.join([first, *others, *reason])}."
