"""docs/pictures are drawn from docs/evidence, of every study that is there; those that are kept by
hand agree with what they show."""

from xml.etree import ElementTree

import pytest

from benchmarks.pictures import DOCS, pictures

SVG = "{http://www.w3.org/2000/svg}"


def picture(name: str) -> ElementTree.Element:
    return ElementTree.parse(DOCS / "pictures" / f"{name}.svg").getroot()


def test_every_folder_stands_on_a_floor_once():
    words = list(picture("floors").itertext())
    for file in DOCS.with_name("cera_train").glob("*/__init__.py"):
        assert words.count(file.parent.name) == 1, file.parent.name


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


def test_the_pictures_are_those_of_the_evidence():
    for name, svg in pictures().items():
        path = DOCS / "pictures" / f"{name}.svg"
        assert path.read_text() == svg, "make pictures draws it anew"
        assert path.stat().st_size < 100_000
