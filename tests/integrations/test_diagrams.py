"""The pictures of docs/pictures that are kept by hand agree with what they show."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def picture(name: str) -> ElementTree.Element:
    return ElementTree.parse(ROOT / "docs" / "pictures" / f"{name}.svg").getroot()


def test_every_folder_stands_on_a_floor_once():
    words = list(picture("floors").itertext())
    for file in (ROOT / "cera_train").glob("*/__init__.py"):
        assert words.count(file.parent.name) == 1, file.parent.name


def test_the_terminal_shows_what_the_tutorial_does():
    """Supervised text is marked."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    [block] = re.findall(r"<!-- output: quickstart\b.*?-->\n```\n(.*?)\n```", page, re.DOTALL)
    command, *lines = picture("terminal").iter(f"{SVG}text")
    assert command.text == "$ make quickstart"
    shown = ["".join(line.itertext()) for line in lines]
    assert shown == re.sub(r"\[\[|\]\]", "", block).splitlines()
    marked = [span.text for line in lines for span in line if span.get("class") == "marked"]
    assert marked == re.findall(r"\[\[(.*?)\]\]", block)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "recipe", picture("memory").find(f"{SVG}desc").text.rstrip(".").split("; ")
)
def test_the_memory_is_what_is_planned_today(plan, recipe):
    name, sizes = recipe.split(": ")
    planned = ", ".join(
        f"{part} {size / 1e9:.2f} GB" for part, size in plan(f"+recipe={name}").memory.items()
    )
    assert planned == sizes
