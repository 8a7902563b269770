"""How non-linear must a needed change be before a gate pays? The commands are in
conf/study/dose.yaml.

A teacher's branch is sqrt(1 - d) linear + sqrt(d) even, of the same power at every dose d, beside
v_proj, which adapters on q_proj and v_proj adapt, or down_proj, which they do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

from benchmarks.ground_truth import (
    HELD_OUT,
    V_PROJ,
    Teacher,
    make_base,
    make_tokenizer,
    sentences,
    write,
)
from benchmarks.rows import write_result
from cera_train.verdicts.contrast import contrast_over_bases
from cera_train.verdicts.interval import ERROR_RATE
from cera_train.verdicts.power import detectable
from cera_train.verdicts.verdict import holm

FOLDER = Path("outputs/dose")
LONGER = Path("outputs/dose_long")
"""The same studies with more updates, at the ends of the dose."""
DOSES = (0.0, 0.1, 0.3, 1.0)
ENDS = (DOSES[0], DOSES[-1])
PLACES = {"v_proj": V_PROJ, "down_proj": "mlp.down_proj"}
WRITTEN = 16_000
"""Sentences that a teacher begins: 300 updates read each at most once."""
UPDATES = 1_500
"""Of the base's training."""
ARMS = {"q and v": ("half_qv", "cera_qv"), "all linears": ("half_all", "cera_all")}
"""Without the gate and with it, by what adapters are on."""


def name_of(place: str, dose: float) -> str:
    return f"{place}_d{dose:g}"


# --- teachers -------------------------------------------------------------------------------------


def make(seed: int) -> None:
    """Trains a base on sentences of its own. Writes the rows of its teachers, and how well teacher
    and base predict those held out."""
    folder = FOLDER / f"b{seed}"
    make_base(folder, UPDATES, seed, sentences(seed))
    base = LlamaForCausalLM.from_pretrained(folder / "base" / "adapter").eval()
    ends = {}
    for place, path in PLACES.items():
        for dose in DOSES:
            name = name_of(place, dose)
            teacher = Teacher(base, make_tokenizer(), dose, seed, sentences(seed), path)
            rows = write(folder / f"{name}.jsonl", teacher.writes(WRITTEN), seed=seed)
            held_out = rows[-HELD_OUT:]  # as the study holds out
            ends[name] = {"base": teacher.loss(held_out), "r2_of_affine": teacher.r2_of_affine}
            with teacher.attach():
                ends[name]["teacher"] = teacher.loss(held_out)
            print(f"{name:14}{len(rows):,} sentences {ends[name]}", flush=True)
    write_result(folder / "ends.json", ends)


# --- what was found -------------------------------------------------------------------------------


Study = dict[str, Any]
"""The content of study_results.json."""


def read(name: str, folder: Path) -> Study:
    return json.loads((folder / name / "report" / "study_results.json").read_text())


def contrast_of(study: Study, arms: tuple[str, str]) -> dict[str, Any]:
    [found] = [each for each in study["contrasts"] if (each["first"], each["second"]) == arms]
    return found


def change(place: str, arms: tuple[str, str]) -> dict[str, Any]:
    """The contrast of two arms at the largest dose minus that without any, over bases."""
    none, most = (contrast_of(read(name_of(place, dose), FOLDER), arms) for dose in ENDS)
    by_base = np.subtract(most["by_seed"], none["by_seed"]).tolist()
    between = none["between"] + most["between"]
    found = contrast_over_bases(by_base, HELD_OUT, between)
    least = detectable(found.variances, found.seeds, found.problems, len(PLACES)) + between
    obstacles = none["obstacles"] + most["obstacles"]
    return asdict(found) | {"by_base": by_base, "detectable": least, "obstacles": obstacles}


def curve(
    folder: Path, doses: Sequence[float], place: str, arms: tuple[str, str]
) -> list[dict[str, Any]]:
    """The contrast at each dose, with Holm's correction over them."""
    fields = ("difference", "lower", "upper", "p_value", "obstacles")
    points = []
    for dose in doses:
        found = contrast_of(read(name_of(place, dose), folder), arms)
        points.append({"dose": dose} | {field: found[field] for field in fields})
    return with_holm(points)


def with_holm(contrasts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    p_values = holm([each["p_value"] for each in contrasts])
    return [each | {"p_holm": p} for each, p in zip(contrasts, p_values, strict=True)]


def smallest_shown(points: list[dict[str, Any]]) -> float | None:
    """The smallest dose at which the gate's gain is shown."""
    doses = [
        point["dose"]
        for point in points
        if point["p_holm"] <= ERROR_RATE and point["difference"] < 0 and not point["obstacles"]
    ]
    return min(doses, default=None)


def shares(name: str) -> dict[str, float]:
    """Arm -> the mean over bases of its share of the way from the base's loss to the teacher's."""
    study = read(name, FOLDER)
    bases = study["contrasts"][0]["by_base"]
    ends = [json.loads((FOLDER / base / "ends.json").read_text())[name] for base in bases]
    base, teacher = (np.array([each[end] for each in ends]) for end in ("base", "teacher"))
    return {
        cell["arm"]: float(((base - cell["outcomes"]["loss"]) / (base - teacher)).mean())
        for cell in study["cells"]
    }


def curves(folder: Path, doses: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{place}, adapters on {where}": curve(folder, doses, place, arms)
        for place, (where, arms) in itertools.product(PLACES, ARMS.items())
    }


def judge() -> dict[str, Any]:
    """The two primary contrasts of contrasts, curves over the dose, and shares of what can be
    gained."""
    primary = [{"place": place} | change(place, ARMS["q and v"]) for place in PLACES]
    by_dose = curves(FOLDER, DOSES)
    names = itertools.starmap(name_of, itertools.product(PLACES, DOSES))
    return {
        "primary": with_holm(primary),
        "smallest_dose": {where: smallest_shown(points) for where, points in by_dose.items()},
        "curves": by_dose,
        "longer": curves(LONGER, ENDS) if LONGER.exists() else None,
        "shares": {name: shares(name) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of a base to make, with its teachers")
    options = parser.parse_args()
    if options.seed is not None:
        make(options.seed)
        return
    write_result(FOLDER / "dose.json", judge())
    print((FOLDER / "dose.json").read_text())


if __name__ == "__main__":
    main()
