"""`cera-train ... --save DIR/recipe/NAME.yaml`: what was typed as a recipe."""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cera_train.common.files import options, write_text
from cera_train.common.settings import require
from cera_train.common.terminal import print_command
from cera_train.common.trust import redact_tree


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
            defaults.append({"/recipe": override.value()})
        elif options(key):
            defaults.append({f"override /{key}": override.value()})
        else:
            OmegaConf.update(settings, key, override.value())
    recipe = {"defaults": defaults} | redact_tree(OmegaConf.to_container(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# @package _global_\n{OmegaConf.to_yaml(recipe)}")
    print_command(
        "saved",
        ["cera-train", "--config-dir", str(path.parent.parent), f"+recipe={path.stem}"],
    )
