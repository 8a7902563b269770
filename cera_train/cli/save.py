"""`cera-train ... --save DIR/recipe/NAME.yaml`: what was typed as a recipe."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cera_train.cli.help import sentences_of
from cera_train.cli.mistakes import SCHEMAS
from cera_train.common.files import options, write_text
from cera_train.common.settings import require
from cera_train.common.terminal import print_command
from cera_train.common.trust import redact_tree

PROGRAM = "cera-train"


def save_recipe(path: Path, overrides: list[str]) -> None:
    """Writes a recipe and prints the command that runs it. Raises UserError where it cannot be
    found by its name, or is there."""
    place = f"--save={path}"
    is_recipe = (path.parent.name, path.suffix) == ("recipe", ".yaml")
    require(is_recipe, f"{place}: name a file in a folder `recipe`, such as mine/recipe/mine.yaml.")
    require(not path.exists(), f"{place} is there: remove it, or choose another name.")
    defaults = []
    settings = OmegaConf.create({"name": path.stem})
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "recipe":
            defaults.append(f"  - /recipe/{override.value()}")
        elif options(key):
            defaults.append(f"  - override /{key}: {override.value()}")
        else:
            OmegaConf.update(settings, key, override.value())
    sentences = sentences_of(SCHEMAS[PROGRAM])
    lines = ["# @package _global_"]
    if defaults:
        lines += ["defaults:", *defaults, ""]
    lines += lines_of(redact_tree(OmegaConf.to_container(settings)), sentences)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join([*lines, ""]))
    command = [PROGRAM, "--config-dir", str(path.parent.parent), f"+recipe={path.stem}"]
    print_command("saved", command)


def lines_of(
    settings: dict[str, Any], sentences: dict[str, str], section: str = ""
) -> Iterator[str]:
    """The settings as YAML, each with the start of its sentence."""
    indent = "  " * section.count(".")
    for name, value in settings.items():
        key = f"{section}{name}"
        is_section = any(other.startswith(f"{key}.") for other in sentences)
        if is_section and value:
            yield f"{indent}{name}:"
            yield from lines_of(value, sentences, f"{key}.")
        else:
            sentence = sentences.get(key, "").partition(". ")[0].rstrip(".")
            comment = f"  # {sentence}" if sentence else ""
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}{comment}"
