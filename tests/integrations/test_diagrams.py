"""The pictures of docs/pictures that are no evidence agree with what they are drawn from."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks.diagrams import MEMORY, PLANNED, ROOT, diagrams

PICTURES = {diagram.name: diagram for diagram in diagrams()}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_todays_files(name):
    path = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert path.read_text() == PICTURES[name].svg, "make pictures draws it anew"
    assert path.stat().st_size < 100_000


def words_of(name: str) -> list[str]:
    return list(ElementTree.fromstring(PICTURES[name].svg).itertext())


def test_every_folder_stands_on_a_floor_once():
    words = words_of("floors")
    for file in (ROOT / "cera_train").glob("*/__init__.py"):
        assert words.count(file.parent.name) == 1, file.parent.name


def test_the_terminal_marks_what_is_supervised():
    words = words_of("terminal")
    assert words[words.index("           Answer:") + 1] == " 1924-06-08<|im_end|>"


@pytest.mark.nightly
@pytest.mark.parametrize("name", PLANNED)
def test_the_memory_is_what_is_planned_today(plan, name):
    assert json.loads(MEMORY.read_text())[name] == pytest.approx(
        plan(f"+recipe={name}").memory, rel=0.01
    )
