"""The pictures of docs/pictures that are no evidence agree with what they are drawn from."""

import json
from xml.etree import ElementTree

import pytest
from conftest import TINY

from benchmarks import update
from benchmarks.diagrams import MEMORY, PLANNED, ROOT, diagrams, growth

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


def test_the_parts_of_an_update_are_measured_for_the_picture(tiny_folder, tmp_path, capsys):
    words = [f"model.path={tiny_folder}", *TINY, *update.COMMON, "train.compile=false"]
    update.profile_all({"tiny": words}, 1, tmp_path / "update.json")
    measured = json.loads((tmp_path / "update.json").read_text())
    parts = measured["seconds"]["tiny"]
    assert {"base products", "branches", "norms", "head and loss", "optimizer"} <= parts.keys()
    assert measured["processor"]
    assert measured["commit"]
    printed = [line.rsplit(maxsplit=1)[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[1:] == [*parts]


def test_in_the_picture_of_growth_what_costs_more_is_higher():
    points = [
        {"kind": "cera", "value": value, "seconds": value / 10, "memory": value * 1e9}
        for value in (1, 2, 4)
    ]
    measured = {"processor": "AMD", "commit": "abc", "threads": 2, "curves": {"rank": points}}
    circles = ElementTree.fromstring(growth(measured).svg).iter(
        "{http://www.w3.org/2000/svg}circle"
    )
    seconds_and_memory = [float(circle.get("cy")) for circle in circles]
    assert seconds_and_memory[:3] == sorted({*seconds_and_memory[:3]}, reverse=True)
    assert seconds_and_memory[3:] == sorted({*seconds_and_memory[3:]}, reverse=True)
    assert len(seconds_and_memory) == 6


@pytest.mark.nightly
@pytest.mark.parametrize("name", PLANNED)
def test_the_memory_is_what_is_planned_today(plan, name):
    assert json.loads(MEMORY.read_text())[name] == pytest.approx(
        plan(f"+recipe={name}").memory, rel=0.01
    )
