"""How non-linear must a needed change be before a gate pays? The commands are in
conf/study/dose.yaml.

A teacher's branch is sqrt(1 - d) linear + sqrt(d) even, of the same power at every dose d, beside
v_proj, which adapters on q_proj and v_proj adapt, or down_proj, which they do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

from benchmarks.ground_truth import (
    HELD_OUT,
    V_PROJ,
    Teacher,
    make_base,
    sentences,
    write_taught,
)
from benchmarks.rows import with_holm, write_result
from benchmarks.tiny_models import byte_tokenizer
from cera_train.report.template import load_template
from cera_train.verdicts.contrast import contrast_over_bases
from cera_train.verdicts.interval import ERROR_RATE
from cera_train.verdicts.power import detectable

FOLDER = Path("outputs/dose")
EVIDENCE = Path("docs/evidence/dose")
NATURAL = Path("docs/evidence/natural/layer_10.json")
LONGER = "_long"
"""Ends the name of a study with more updates."""
GAIN = ("difference", "between", "obstacles")
"""What is kept of a contrast."""
DOSES = (0.0, 0.1, 0.3, 1.0)
ENDS = (DOSES[0], DOSES[-1])
PLACES = {"v_proj": V_PROJ, "down_proj": "mlp.down_proj"}
WRITTEN = 16_000
"""Sentences that a teacher begins: 300 updates read each at most once."""
ARMS = {"q and v": ("half_qv", "cera_qv"), "all linears": ("half_all", "cera_all")}
"""Without the gate and with it, by what adapters are on."""


def folder_of(seed: int) -> Path:
    """Of a base, its teachers and their studies."""
    return FOLDER / f"b{seed}"


def name_of(place: str, dose: float) -> str:
    return f"{place}_d{dose:g}"


# --- teachers -------------------------------------------------------------------------------------


def make(seed: int) -> None:
    """Trains a base on sentences of its own. Writes the rows of its teachers, and how well teacher
    and base predict those held out."""
    folder = folder_of(seed)
    make_base(folder, sentences(seed), seed)
    base = LlamaForCausalLM.from_pretrained(folder / "base" / "adapter").eval()
    ends = {}
    for place, path in PLACES.items():
        for dose in DOSES:
            name = name_of(place, dose)
            teacher = Teacher(base, byte_tokenizer(), dose, seed, sentences(seed), path)
            _, ends[name] = write_taught(folder / f"{name}.jsonl", teacher, WRITTEN)
    write_result(folder / "ends.json", ends)


# --- what was found -------------------------------------------------------------------------------

Found = dict[str, dict[str, Any]]
"""What the studies on one base found, by their names."""


def gather(seed: int) -> Found:
    """What the studies on a base found whose reports are written: the losses of base, teacher and
    arms, the rates that were chosen, and the gate's gain by where adapters are."""
    folder = folder_of(seed)
    ends = json.loads((folder / "ends.json").read_text())
    found = {}
    for report in sorted(folder.glob("*/report/study_results.json")):
        study = json.loads(report.read_text())
        contrasts = {(each["first"], each["second"]): each for each in study["contrasts"]}
        name = report.parts[-3]
        found[name] = ends[name.removesuffix(LONGER)] | {
            "losses": {cell["arm"]: fmean(cell["outcomes"]["loss"]) for cell in study["cells"]},
            "chosen": {cell["arm"]: cell["chosen"] for cell in study["cells"]},
            "gain": {
                where: {field: contrasts[arms][field] for field in GAIN}
                for where, arms in ARMS.items()
            },
        }
    return found


@dataclass(frozen=True)
class Gain:
    """CeRA - half, in nats a token."""

    by_base: np.ndarray
    between: float
    """What rates between those of the grids could still change."""
    obstacles: list[str]

    @classmethod
    def of(cls, bases: list[Found], name: str, where: str) -> Gain:
        found = [base[name]["gain"][where] for base in bases if name in base]
        return cls(
            np.array([each["difference"] for each in found]),
            fmean(each["between"] for each in found),
            list(itertools.chain.from_iterable(each["obstacles"] for each in found)),
        )

    def __sub__(self, other: Gain) -> Gain:
        return Gain(
            self.by_base - other.by_base,
            self.between + other.between,
            self.obstacles + other.obstacles,
        )

    def contrast(self, tests: int) -> dict[str, Any]:
        """Over bases, with what could have been detected among so many tests."""
        found = contrast_over_bases(self.by_base.tolist(), HELD_OUT, self.between)
        least = detectable(found.variances, found.seeds, found.problems, tests) + self.between
        beside = {"by_base": self.by_base.tolist(), "obstacles": self.obstacles}
        return asdict(found) | {"detectable": least} | beside


def curves(
    bases: list[Found], places: Iterable[str], doses: Sequence[float], ending: str = ""
) -> dict[str, Any]:
    """The gain at each dose, with Holm's correction over them, by place and by where adapters
    are."""
    return {
        f"{place}, adapters on {where}": with_holm(
            [
                {"dose": dose}
                | Gain.of(bases, name_of(place, dose) + ending, where).contrast(len(doses))
                for dose in doses
            ]
        )
        for place, where in itertools.product(places, ARMS)
    }


def smallest_shown(points: list[dict[str, Any]]) -> float | None:
    """The smallest dose at which the gate's gain is shown."""
    doses = [
        point["dose"]
        for point in points
        if point["p_holm"] <= ERROR_RATE and point["difference"] < 0 and not point["obstacles"]
    ]
    return min(doses, default=None)


def shares(bases: list[Found], name: str) -> dict[str, float]:
    """Arm -> the mean over bases of its share of the way from the base's loss to the teacher's."""
    found = [base[name] for base in bases if name in base]
    return {
        arm: fmean(
            (each["base"] - each["losses"][arm]) / (each["base"] - each["teacher"])
            for each in found
        )
        for arm in found[0]["losses"]
    }


def judge(bases: list[Found]) -> dict[str, Any]:
    """The two primary contrasts of contrasts, curves over the dose, and shares of what can be
    gained."""
    primary = []
    for place in PLACES:
        none, most = (Gain.of(bases, name_of(place, dose), "q and v") for dose in ENDS)
        primary.append({"place": place} | (most - none).contrast(len(PLACES)))
    by_dose = curves(bases, PLACES, DOSES)
    names = itertools.starmap(name_of, itertools.product(PLACES, DOSES))
    longer = [base for base in bases if name_of("v_proj", ENDS[0]) + LONGER in base]
    return {
        "primary": with_holm(primary),
        "smallest_dose": {where: smallest_shown(points) for where, points in by_dose.items()},
        "curves": by_dose,
        "longer": curves(longer, ["v_proj"], ENDS, LONGER) if longer else None,
        "shares": {name: shares(bases, name) for name in names},
    }


# --- the picture ----------------------------------------------------------------------------------


def draw(bases: list[Found]) -> str:
    """The gate's gain by dose, and the doses of natural changes: an SVG for light and dark
    pages."""
    return load_template("dose.svg", "benchmarks").render(
        curves=curves(bases, PLACES, DOSES),
        arms=ARMS,
        taught=PLACES,
        doses=DOSES,
        natural=json.loads(NATURAL.read_text()),
        places={**PLACES, "o_proj": "self_attn.o_proj"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of a base to make, with its teachers")
    parser.add_argument("--gather", type=int, metavar="SEED", help="of a base with reports")
    parser.add_argument("bases", type=Path, nargs="*", help="what was gathered, to judge")
    options = parser.parse_args()
    if options.seed is not None:
        make(options.seed)
    elif options.gather is not None:
        write_result(EVIDENCE / f"b{options.gather}.json", gather(options.gather))
    else:
        judged = judge([json.loads(file.read_text()) for file in options.bases])
        write_result(EVIDENCE / "judged.json", judged)
        print((EVIDENCE / "judged.json").read_text())


if __name__ == "__main__":
    main()
