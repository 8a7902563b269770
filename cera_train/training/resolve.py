"""Decides every setting that `auto` leaves open, once, before anything is loaded: as in the run
that the folder holds, else by this machine, the model and the rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cera_train.adapters import build as adapters
from cera_train.common.settings import AUTO, Choice
from cera_train.data.chats import may_use_template
from cera_train.data.sources import decide_layouts, decide_switches
from cera_train.distributed.accelerator import this_device
from cera_train.model.compiled import can_compile
from cera_train.model.folder import load_tokenizer
from cera_train.model.precision import choose_precision
from cera_train.runs.folder import has_saved
from cera_train.runs.records import OPEN, as_recorded, check_config, load_config
from cera_train.runs.subject import digest_of, find_adapter, find_start
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.run import Config
from cera_train.training.optimizer import auto_rate


@dataclass(frozen=True)
class Resolved:
    """A config without `auto`, and the reasons for the settings of `CHOICES`, by their keys."""

    config: Config
    why: dict[str, str]


def resolve(config: Config, folder: Path) -> Resolved:
    """Decides every `auto` of a config. Raises UserError if a setting cannot work here.

    Args:
        folder: of the run; it may hold an unfinished run.
    """
    adapters.check(config.adapter)
    if not has_saved(folder):
        return decide(config)
    record = folder / "config.yaml"
    resolved = decide(config, load_config(record), f"as {folder} was begun")
    check_config(record, resolved.config)
    return resolved


def decide(config: Config, recorded: Config | None = None, reason: str = "") -> Resolved:
    """Decides what a config leaves open: as a run recorded it, else by this machine, the model and
    the rows.

    Args:
        reason: for what the record decides.
    """
    given = config
    if recorded is not None:
        config = as_recorded(config, recorded)
    config = replace(config, data=decide_layouts(config.data))
    why = {}
    for key, choose in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        before = getattr(getattr(given, section), name)
        may_be_recorded = recorded is not None and (before in OPEN or isinstance(before, dict))
        is_recorded = may_be_recorded and value == getattr(getattr(recorded, section), name)
        choice = Choice(value, reason) if is_recorded and value not in OPEN else choose(config)
        decided = replace(getattr(config, section), **{name: choice.value})
        config = replace(config, **{section: decided})
        why[key] = choice.why
    return Resolved(config, why)


def choose_rate(config: Config) -> Choice[float]:
    if config.optimizer.lr != AUTO:
        return Choice(config.optimizer.lr, "")
    return auto_rate(config.model, config.adapter, config.train.objective)


def choose_compile(config: Config) -> Choice[bool]:
    if config.train.compile is not None:
        return Choice(config.train.compile, f"train.compile={str(config.train.compile).lower()}")
    device = this_device()
    if device.type != "cuda":
        return Choice(False, "compiling takes longer than it saves on a CPU")
    if config.adapter.kind == AdapterKind.dora:
        return Choice(False, "every layer of DoRA would be compiled anew")
    if not can_compile(device):
        return Choice(False, "there is no compiler")
    return Choice(True, "a GPU and a compiler")


def choose_start_digest(config: Config) -> Choice[str | None]:
    """The digest of the weights that `adapter.start_from` names."""
    if config.adapter.start_from is None:
        return Choice(None, "")
    return Choice(digest_of(find_start(config.adapter)), "")


def choose_template_settings(config: Config) -> Choice[dict[str, Any]]:
    """The chat template's switches that all answers need, or that the run to start from recorded:
    it answers as it learned to. Those of the command win."""
    data = config.data
    if any(may_use_template(part) for _, part in data.parts()):
        data = decide_switches(data, load_tokenizer(config.model), config.learns_answers)
        if not config.learns_answers:
            learned = settings_of_start(config.adapter)
            return Choice(learned | data.template_settings, "")
    return Choice(data.template_settings, "")


def settings_of_start(adapter: AdapterConfig) -> dict[str, Any]:
    """The settings of the chat template that the run to start from recorded."""
    if adapter.start_from is None:
        return {}
    run, _ = find_adapter(Path(adapter.start_from), "adapter.start_from")
    return load_config(run / "config.yaml").data.template_settings if run else {}


CHOICES: dict[str, Callable[[Config], Choice]] = {
    "model.dtype": lambda config: choose_precision(config.model.dtype, this_device()),
    "optimizer.lr": choose_rate,
    "train.compile": choose_compile,
    "adapter.start_digest": choose_start_digest,
    "data.template_settings": choose_template_settings,
}
"""Settings that may be left open -> what chooses them where no record does."""
