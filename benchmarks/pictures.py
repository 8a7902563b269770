"""Draws the evidence in docs/pictures: `python -m benchmarks.pictures`.

evidence.svg has the contrasts that docs/evidence/short.yaml lists, dose.svg the curves of
docs/evidence/dose. The other pictures are kept by hand.
"""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks import dose
from cera_train.common.files import read_yaml, write_text
from cera_train.report.forest import Forest, Group, row_of
from cera_train.settings.sweep import LOSS
from cera_train.study.page import CAPTION, brief, contrast_name, unit_of
from cera_train.study.results import SHARE, OutcomeContrast

DOCS = Path(__file__).parents[1] / "docs"

EVIDENCE_CAPTION = f"{CAPTION} What matters is at most {100 * SHARE:.0f} % of the loss."


class Finding(NamedTuple):
    """A contrast of a study in its first outcome."""

    name: str  # such as `teachers: cera - lora, even`
    matters: float
    contrast: OutcomeContrast


def group_of(heading: str, findings: dict[str, Finding]) -> Group:
    """
    Args:
        findings: by the label of their rows; all in nats, or all of one score.
    """
    outcome = next(iter(findings.values())).contrast.outcome
    unit = unit_of(outcome, [finding.matters for finding in findings.values()])
    rows = [row_of(finding.contrast, finding.matters, label) for label, finding in findings.items()]
    return Group(heading, unit, rows)


def read_findings(folder: Path) -> list[Finding]:
    """Those of every study but the earlier ones, whose files do not say what would matter."""
    findings = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        config = results.get("config")
        if config is None:
            continue
        has_conditions = len({saved["condition"] for saved in results["contrasts"]}) > 1
        for saved in results["contrasts"]:
            contrast = OutcomeContrast(**saved)
            name = f"{path.stem}: {contrast_name(contrast)}"
            if has_conditions:
                name += f", {brief(contrast.condition)}"
            if contrast.outcome == config["outcomes"][0]:
                matters = what_matters(contrast, results)
                findings.append(Finding(name, matters, contrast))
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


def forest_of(findings: list[Finding], headings: dict[str, dict[str, str]]) -> Forest:
    """The contrasts of a list.

    Args:
        headings: heading -> label -> the name of a finding.
    """
    by_name = {finding.name: finding for finding in findings}
    groups = [
        group_of(heading, {label: by_name[name] for label, name in names.items()})
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
