"""Decides every setting that `auto` leaves open, once, before anything is loaded: as in the run
that the folder holds, else by this machine, the model and the rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cera_train.adapters import build as adapters
from cera_train.common.settings import AUTO, Choice, to_plain
from cera_train.common.trust import redact_tree
from cera_train.data.chats import may_use_template
from cera_train.data.sources import decide_layouts, decide_switches
from cera_train.distributed.accelerator import this_device
from cera_train.model.compiled import can_compile
from cera_train.model.folder import load_tokenizer
from cera_train.model.precision import choose_precision
from cera_train.runs.folder import has_saved
from cera_train.runs.records import differences, load_config
from cera_train.runs.results import DIVERGED
from cera_train.runs.subject import digest_of, find_adapter, find_start, run_of
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.data import DataConfig, Layout, MixPart
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
    config = replace(config, data=decide_layouts(config.data))
    record = folder / "config.yaml"
    if starts_anew(folder):
        return decide(config, None, folder)
    resolved = decide(config, load_config(record), folder)
    if not has_saved(folder) and differences(record, redact_tree(to_plain(resolved.config))):
        # Another run began here and left nothing: its choices fit other settings.
        return decide(config, None, folder)
    return resolved


def decide(config: Config, recorded: Config | None, folder: Path) -> Resolved:
    """Decides every `auto` of a config as a run recorded it, else by this machine, the model and
    the rows."""
    begun = recorded or config
    why = {}
    chosen = config
    for key, choose in CHOICES.items():
        section, name = key.split(".")
        wanted = getattr(getattr(config, section), name)
        known = getattr(getattr(begun, section), name)
        if wanted in OPEN and known not in OPEN:
            choice = Choice(known, f"as {folder} was begun")
        else:
            choice = choose(config)
        decided = replace(getattr(config, section), **{name: choice.value})
        chosen = replace(chosen, **{section: decided})
        why[key] = choice.why
    data = with_known_layouts(config.data, begun.data)
    chosen = replace(
        chosen,
        adapter=with_start_digest(config.adapter, begun.adapter),
        data=with_template_settings(config, data, recorded and recorded.data),
    )
    return Resolved(chosen, why)


def starts_anew(folder: Path) -> bool:
    """Whether there is nothing to resume: no run in the folder, or one that diverged before its
    first checkpoint."""
    is_lost = (folder / DIVERGED).exists() and not has_saved(folder)
    has_config = (folder / "config.yaml").is_file()
    return not has_config or is_lost


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


CHOICES: dict[str, Callable[[Config], Choice]] = {
    "model.dtype": lambda config: choose_precision(config.model.dtype),
    "optimizer.lr": choose_rate,
    "train.compile": choose_compile,
}
"""Settings that may be left open -> what chooses them where no record does."""

OPEN = (AUTO, None)


def with_start_digest(adapter: AdapterConfig, begun: AdapterConfig) -> AdapterConfig:
    """The adapter's settings with the digest of the weights that `adapter.start_from` names. A
    resumed run keeps the recorded digest: the weights may be gone."""
    if adapter.start_from is None:
        return adapter
    recorded = begun.start_digest if adapter.start_from == begun.start_from else None
    return replace(adapter, start_digest=recorded or digest_of(find_start(adapter)))


def with_template_settings(
    config: Config, data: DataConfig, begun: DataConfig | None
) -> DataConfig:
    """The data's settings with the chat template's switches: those of the run in the folder, else
    those that all answers need, or that the run to start from recorded."""
    if begun is not None and data.template_settings.items() <= begun.template_settings.items():
        return replace(data, template_settings=begun.template_settings)
    has_chats = any(may_use_template(part) for _, part in data.parts())
    if not has_chats:
        return data
    data = decide_switches(data, load_tokenizer(config.model), config.learns_answers)
    return data if config.learns_answers else with_settings_of_start(data, config.adapter)


def with_settings_of_start(data: DataConfig, adapter: AdapterConfig) -> DataConfig:
    """The data's settings with those of the chat template that the run to start from recorded: it
    answers as it learned to. Those of the command win."""
    if adapter.start_from is None:
        return data
    _, folder = find_adapter(Path(adapter.start_from), "adapter.start_from")
    if (run := run_of(folder)) is None:
        return data
    learned = load_config(run / "config.yaml").data.template_settings
    return replace(data, template_settings=learned | data.template_settings)


def with_known_layouts(data: DataConfig, begun: DataConfig) -> DataConfig:
    """The data's settings with layouts taken from the run in the folder if missing files, such as
    those of a finished run, leave a layout undecided."""
    is_undecided = any(part.layout == Layout.auto for _, part in data.parts())
    files = [part.train_files for _, part in data.parts()]
    begun_files = [part.train_files for _, part in begun.parts()]
    if not is_undecided or redact_tree(files) != begun_files:
        return data
    if data.mix is not None and begun.mix is not None:
        parts = zip(data.mix, begun.mix, strict=True)
        return replace(data, mix=[replace(part, **layout_of(known)) for part, known in parts])
    turns = data.turns or begun.turns
    return replace(data, turns=turns, rejected=begun.rejected, **layout_of(begun))


def layout_of(rows: DataConfig | MixPart) -> dict[str, Any]:
    """How rows are read."""
    return {name: getattr(rows, name) for name in ("layout", "prompt", "completion")}
