"""Draws the evidence in docs/pictures: `python -m benchmarks.pictures`.

evidence.svg has the contrasts that docs/evidence/short.yaml lists, dose.svg the curves of
docs/evidence/dose. The other pictures are kept by hand.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import dose
from cera_train.common.files import read_yaml, write_text
from cera_train.report.forest import Forest, Group, row_of
from cera_train.settings.sweep import LOSS
from cera_train.study.page import CAPTION, brief, contrast_name, unit_of
from cera_train.study.results import SHARE, OutcomeContrast

DOCS = Path(__file__).parents[1] / "docs"

EVIDENCE_CAPTION = f"{CAPTION} What matters is at most {100 * SHARE:.0f} % of the loss."


Findings = dict[str, OutcomeContrast]
"""Contrasts of studies in their first outcome, by names such as `teachers: cera - lora, even`."""


def group_of(heading: str, findings: Findings) -> Group:
    """
    Args:
        findings: by the label of their rows; all in nats, or all of one score.
    """
    contrasts = list(findings.values())
    unit = unit_of(contrasts[0].outcome, [contrast.matters for contrast in contrasts])
    rows = [row_of(contrast, contrast.matters, label) for label, contrast in findings.items()]
    return Group(heading, unit, rows)


def read_findings(folder: Path) -> Findings:
    """Those of every study but the earlier ones, whose files do not say what would matter."""
    findings = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        config = results.get("config")
        if config is None:
            continue
        has_conditions = len({saved["condition"] for saved in results["contrasts"]}) > 1
        for saved in results["contrasts"]:
            saved.pop("by_base", None)  # kept until 0.2.0
            contrast = OutcomeContrast(**saved)
            name = f"{path.stem}: {contrast_name(contrast)}"
            if has_conditions:
                name += f", {brief(contrast.condition)}"
            if contrast.outcome == config["outcomes"][0]:
                findings[name] = replace(contrast, matters=what_matters(contrast, results))
    return findings


def what_matters(contrast: OutcomeContrast, results: dict[str, Any]) -> float:
    """The smallest difference that matters: the study's; of a loss at most SHARE of the lowest one
    among the arms of the contrast's first side."""
    matters = results["config"]["matters"]
    if contrast.outcome != LOSS:
        return matters
    shares = [
        float(f"{SHARE * fmean(cell['outcomes'][LOSS]):.2g}")
        for cell in results["cells"]
        if cell["arm"] in re.findall(r"\w+", contrast.first)
        and cell["condition"] in ("", contrast.condition)
    ]
    return min([matters, *shares])


def forest_of(findings: Findings, headings: dict[str, dict[str, str]]) -> Forest:
    """The contrasts of a list.

    Args:
        headings: heading -> label -> the name of a finding.
    """
    groups = [
        group_of(heading, {label: findings[name] for label, name in names.items()})
        for heading, names in headings.items()
    ]
    return Forest("evidence", "Should I use CeRA?", EVIDENCE_CAPTION, groups)


def pictures() -> dict[str, str]:
    """Name -> SVG."""
    evidence = DOCS / "evidence"
    forest = forest_of(read_findings(evidence), read_yaml(evidence / "short.yaml"))
    bases = [json.loads(file.read_text()) for file in sorted(evidence.glob("dose/b*.json"))]
    return {"evidence": forest.svg, "dose": dose.draw(bases)}


def main() -> None:
    for name, svg in pictures().items():
        path = DOCS / "pictures" / f"{name}.svg"
        write_text(path, svg)
        print(path)


if __name__ == "__main__":
    main()
