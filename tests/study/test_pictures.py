"""docs/pictures are drawn from docs/evidence, of every study that is there."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.pictures import DOCS, forests, read_findings
from cera_train.common.files import read_yaml

STUDIES = DOCS.parent / "conf" / "study"


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
        results = json.loads(path.read_text())
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


def test_a_study_that_is_added_is_drawn(tmp_path: Path):
    """With bases, places of its own, and a difference of differences."""
    folder = tmp_path / "evidence"
    shutil.copytree(DOCS / "evidence", folder)
    results = json.loads((folder / "triggers.json").read_text())
    results["config"] |= {"question": "At all linears?", "matters": 0.01}
    template = results["contrasts"][0] | {"condition": "", "by_base": {"b1": [0.1, 0.2]}}
    sides = [
        ("lora_qv", "cera_qv", "at q and v"),
        ("lora_all", "cera_all", "at all linears"),
        ("half_all", "cera_all", "the gate"),
        ("lora_all", "half_all", "not CeRA's"),
        ("(cera_all - lora_all)", "(cera_qv - lora_qv)", "more at q and v"),
    ]
    results["contrasts"] = [
        template | {"first": first, "second": second, "asked": asked}
        for first, second, asked in sides
    ]
    results["contrasts"][1]["difference"] = -0.5
    results["contrasts"][-1] |= {"lower": None, "upper": None, "detectable": None}
    (folder / "placement.json").write_text(json.dumps(results))
    every, short = forests(folder)
    [group] = [group for group in every.groups if group.heading == "At all linears?"]
    assert [row.label for row in group.rows] == [
        "placement: cera_qv - lora_qv",
        "placement: cera_all - lora_all",
        "placement: cera_all - half_all",
        "placement: more at q and v",
    ]
    assert group.rows[-1].numbers == "-0.1236"
    [group] = [group for group in short.groups if ", r = 3" in group.heading]
    assert group.rows[-1].numbers.startswith("-0.5000")


def test_what_a_perfect_arm_would_gain_is_never_too_small():
    """K = 8 formats end at a loss below the 0.01 nats that matter to their study."""
    every, _ = forests()
    marks = {row.label: row.mark for group in every.groups for row in group.rows}
    assert marks["skills: cera - lora, k8"] == "not shown"
    assert marks["start: cera - half"] == "too small"


def test_the_list_of_what_decides_names_what_is_there():
    studies = {
        name.partition(":")[0] for name in (f.name for f in read_findings(DOCS / "evidence"))
    }
    for rows in read_yaml(DOCS / "evidence" / "short.yaml").values():
        for name in rows.values():
            study = name.partition(":")[0]
            assert study in studies or (STUDIES / f"{study}.yaml").exists(), name
