"""docs/pictures are drawn from docs/evidence, of every study that is there."""

from xml.etree import ElementTree

from benchmarks.pictures import DOCS, forests
from cera_train.common.files import read_json


def test_the_pictures_are_those_of_the_evidence():
    pictures = forests()
    assert {path.stem for path in DOCS.glob("pictures/evidence*")} == {
        picture.name for picture in pictures
    }
    for picture in pictures:
        path = DOCS / "pictures" / f"{picture.name}.svg"
        assert path.read_text() == picture.svg, "make pictures draws it anew"
        assert path.stat().st_size < 100_000


def test_every_main_contrast_of_the_evidence_is_in_the_picture():
    drawn = ElementTree.parse(DOCS / "pictures" / "evidence.svg").getroot()
    texts = [text for text in drawn.itertext()]
    count = 0
    for path in DOCS.glob("evidence/*.json"):
        results = read_json(path)
        primary = results.get("config", {"outcomes": [None]})["outcomes"][0]
        for each in results["contrasts"]:
            is_of_cera = each["second"] == "cera" and each["first"] in ("lora", "half")
            is_main = is_of_cera or each["first"].startswith("(")
            if each["outcome"] == primary and is_main:
                factor, digits = (1, 4) if primary == "loss" else (100, 1)
                numbers = [
                    f"{factor * each[key]:+.{digits}f}" for key in ("difference", "lower", "upper")
                ]
                text = "{} ({} to {})".format(*numbers)
                assert text in texts, f"{path.stem}: {each['asked']}"
                count += 1
    assert count >= 41
