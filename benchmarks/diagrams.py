"""The other pictures of the documentation, each drawn from a file that says the same in words or
numbers: the floors of the code, the quickstart in a terminal, the memory of planned runs, the time
of an update and how it grows."""

import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
MEMORY = ROOT / "docs" / "pictures" / "memory.json"
"""Recipe -> part -> bytes of one process, as cera-plan prints them."""
UPDATE = ROOT / "docs" / "pictures" / "update.json"
"""Processor, commit, and name of an update -> part -> CPU seconds, as `python -m benchmarks.update
--profile` prints them."""
GROWTH = ROOT / "docs" / "pictures" / "growth.json"
"""Processor, commit, threads, and what grows -> its points, as `make growth` measures them."""

PLANNED = ("math_r64", "math_dora_r64", "math_lora_r512", "math_r64_nf4")

MARGIN = 12
GAP = 8
LINE = 14  # between lines of text
COLUMN = 7.3  # of a monospaced letter
LETTER = 5.9  # of a small one, in the mean
WIDTH = 480  # as the forest plots: on a telephone the text is still large enough

STYLE = """
.diagram { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
.diagram .card { fill: #fff; stroke: #d9dde2 }
.diagram .room { fill: #eef1f4 }
.diagram text { fill: #1f2328 }
.diagram .soft { fill: #57606a; font-size: 11px }
.diagram .name { font-weight: 600 }
.diagram .end { text-anchor: end }
.diagram .mono { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.diagram .middle { text-anchor: middle }
.diagram .grid { stroke: #d9dde2 }
.diagram .line0 { fill: none; stroke: #0072b2; stroke-width: 2 }
.diagram .line1 { fill: none; stroke: #c04a00; stroke-width: 2 }
.diagram .marked { fill: #1a7f37 }
.diagram .part0 { fill: #0072b2 } .diagram .part1 { fill: #c04a00 } .diagram .part2 { fill: #00795a }
.diagram .part3 { fill: #a8437f }
@media screen and (prefers-color-scheme: dark) {
.diagram .card { fill: #161b22; stroke: #39424e }
.diagram .room { fill: #262d36 }
.diagram text { fill: #e6e9ee }
.diagram .soft { fill: #a3acb8 }
.diagram .grid { stroke: #39424e }
.diagram .line0 { stroke: #6cb6ff }
.diagram .line1 { stroke: #ffa657 }
.diagram .marked { fill: #56d364 }
.diagram .part0 { fill: #6cb6ff } .diagram .part1 { fill: #ffa657 } .diagram .part2 { fill: #56d3a5 }
.diagram .part3 { fill: #e58cc0 }
}
"""  # noqa: E501
"""Colours of the reader's theme."""


@dataclass(frozen=True)
class Diagram:
    name: str  # the stem of its file
    title: str
    text: str  # what it shows, in words
    width: float
    height: float
    shapes: Sequence[str]

    @property
    def svg(self) -> str:
        card = rectangle(0.5, 0.5, self.width - 1, self.height - 1, "card")
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width * 1.25:g}" '
            f'height="{self.height * 1.25:g}" role="img" aria-labelledby="title text">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="text">{escape(self.text)}</desc>',
            f"<style>{STYLE}</style>",
            card,
            *self.shapes,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


# --- the floors of the code -----------------------------------------------------------------------


def floors() -> Diagram:
    """The layers of pyproject.toml, which lint enforces, with README's words for each folder. The
    folder in no layer imports nothing of ours: it stands on the ground."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    rows = [layer.split(" | ") for layer in layers]
    tree = (ROOT / "README.md").read_text()
    folders = dict(re.findall(r"^  (\w+)/ +(.+)$", tree, re.MULTILINE))
    named = {folder for row in rows for folder in row}
    rows[-1] += folders.keys() - named

    shapes = []
    top = MARGIN
    for row in rows:
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        letters = int((width - 2 * GAP) / LETTER)
        wrapped = {folder: textwrap.wrap(folders[folder], letters) for folder in row}
        height = LINE * (1 + max(map(len, wrapped.values()))) + GAP
        for number, (folder, lines) in enumerate(wrapped.items()):
            left = MARGIN + number * (width + GAP)
            shapes.append(rectangle(left, top, width, height, "room"))
            shapes.append(text(left + GAP, top + LINE + 1, folder, "name"))
            for place, line in enumerate(lines, start=2):
                shapes.append(text(left + GAP, top + LINE * place, line, "soft"))
        top += height + GAP
    for contract in contracts:
        top += LINE
        shapes.append(text(MARGIN, top, f"{contract['name']}.", "soft"))
    words = "; ".join(", ".join(row) for row in rows)
    title = "The floors of the code"
    return Diagram("floors", title, f"From the top: {words}.", WIDTH, top + MARGIN, shapes)


# --- the quickstart in a terminal -----------------------------------------------------------------


def terminal() -> Diagram:
    """What the tutorial shows, which a test compares with what a run prints; supervised text is
    green, as in a terminal."""
    block = re.search(
        r"<!-- output: quickstart\b.*?-->\n```\n(.*?)\n```", TUTORIAL.read_text(), re.DOTALL
    )
    lines = ["$ make quickstart", *block[1].splitlines()]
    shapes = []
    for number, line in enumerate(lines):
        pieces = re.split(r"\[\[(.*?)\]\]", line)
        spans = [
            f'<tspan class="marked">{escape(piece)}</tspan>' if order % 2 else escape(piece)
            for order, piece in enumerate(pieces)
        ]
        kind = "mono soft" if line == "..." else "mono name" if number == 0 else "mono"
        y = MARGIN + LINE * 1.2 * (number + 0.8)
        place = f'xml:space="preserve" x="{MARGIN}" y="{y:g}"'
        shapes.append(f'<text class="{kind}" {place}>{"".join(spans)}</text>')
    width = 2 * MARGIN + COLUMN * max(len(line.replace("[[", "")) for line in lines)
    height = 2 * MARGIN + LINE * 1.2 * len(lines)
    title = "The quickstart in a terminal"
    return Diagram("terminal", title, " ".join(block[1].split()), width, height, shapes)


# --- the memory of planned runs -------------------------------------------------------------------


def plan_memory() -> None:
    """Plans the recipes, and writes their memory."""
    from cera_train.cli.compose import compose
    from cera_train.planning.make import make_plan

    plans = {name: make_plan(compose(f"+recipe={name}", command="plan")) for name in PLANNED}
    parts = {
        name: {part: round(size) for part, size in plan.memory.items()}
        for name, plan in plans.items()
    }
    MEMORY.write_text(json.dumps(parts, indent=2) + "\n")


def memory() -> Diagram:
    """A bar for each recipe, of its parts."""
    recipes = json.loads(MEMORY.read_text())
    parts = list(dict.fromkeys(part for sizes in recipes.values() for part in sizes))
    peaks = {name: sum(sizes.values()) for name, sizes in recipes.items()}
    longest = WIDTH - 2 * MARGIN
    shapes = []
    top = MARGIN
    for name, sizes in recipes.items():
        shapes.append(text(MARGIN, top + LINE - 3, f"+recipe={name}", "mono"))
        shapes.append(text(WIDTH - MARGIN, top + LINE - 3, f"{peaks[name] / 1e9:.2f} GB", "end"))
        left = MARGIN
        for part, size in sizes.items():
            width = longest * size / max(peaks.values())
            shapes.append(rectangle(left, top + LINE + 2, width, LINE, f"part{parts.index(part)}"))
            left += width
        top += 2 * LINE + 2 * GAP
    shapes += legend(parts, top)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in sizes.items())
        for name, sizes in recipes.items()
    )
    rows = (len(parts) + 1) // 2
    title = "Memory of one process in training, planned"
    return Diagram("memory", title, f"{words}.", WIDTH, top + rows * LINE * 1.3 + MARGIN, shapes)


def legend(parts: Sequence[str], top: float) -> Iterator[str]:
    """Two columns of names."""
    for number, part in enumerate(parts):
        x = MARGIN + WIDTH / 2 * (number % 2)
        y = top + LINE * 1.3 * (number // 2)
        yield rectangle(x, y, 10, 10, f"part{number}")
        yield text(x + 16, y + 9, part, "soft")


# --- where an update's time goes ------------------------------------------------------------------


def update() -> Diagram:
    """A bar for each part of an update."""
    measured = json.loads(UPDATE.read_text())
    left = MARGIN + 110  # of the bars, beside their names
    longest = WIDTH - left - MARGIN - 80
    shapes = []
    words = []
    top = MARGIN
    for name, parts in measured["seconds"].items():
        whole = sum(parts.values())
        shapes.append(text(MARGIN, top + LINE - 3, f"{name}: {whole:.2f} s an update", "name"))
        top += LINE + GAP
        for part, seconds in parts.items():
            width = longest * seconds / max(parts.values())
            figures = f"{seconds:.2f} s, {seconds / whole:.0%}"
            shapes.append(text(MARGIN, top + LINE - 3, part))
            shapes.append(rectangle(left, top, width, LINE, "part0"))
            shapes.append(text(left + width + GAP, top + LINE - 3, figures, "soft"))
            words.append(f"{name}: {part} {figures}")
            top += LINE + GAP
        top += GAP
    place = f"CPU time on one thread, {measured['processor']}, commit {measured['commit']}"
    shapes.append(text(MARGIN, top + LINE - 3, place, "soft"))
    title = "Where an update's time goes"
    height = top + LINE + MARGIN
    return Diagram("update", title, f"{'; '.join(words)}. {place}.", WIDTH, height, shapes)


# --- how an update grows --------------------------------------------------------------------------

PANEL = 84
"""Height of a panel's axes."""
KINDS = {"cera": "CeRA", "lora": "LoRA"}


def growth(measured: dict[str, Any]) -> Diagram:
    """For each thing that grows, a panel of the time and one of the memory. Time is logarithmic:
    growth in proportion is a straight line. Memory is linear, since it grows on top of the
    base's."""
    curves = measured["curves"]
    points = [point for same in curves.values() for point in same]
    exponents = [math.log2(point["seconds"]) for point in points]
    lowest = math.floor(min(exponents))
    step = max(1, math.ceil((max(exponents) - lowest) / 4))
    powers = range(lowest, math.ceil(max(exponents)) + step, step)
    most = math.ceil(max(point["memory"] for point in points) / 1e9)
    scales = {
        "seconds": {2.0**power: power for power in powers},
        "GB": {most * share: most * share for share in (0, 0.5, 1)},
    }
    shapes = [*legend([*KINDS.values()], MARGIN)]
    top = 2.0 * MARGIN + LINE
    for name, same in curves.items():
        times = [math.log2(point["seconds"]) for point in same]
        memories = [point["memory"] / 1e9 for point in same]
        for number, (unit, heights) in enumerate(zip(scales, (times, memories), strict=True)):
            left = MARGIN + number * WIDTH / 2
            shapes.append(text(left, top + LINE, f"{unit}, by {name}", "name"))
            shapes += panel(left, top + 2 * LINE, scales[unit], same, heights)
        top += PANEL + 4 * LINE
    place = f"threads: {measured['threads']}, {measured['processor']}, commit {measured['commit']}"
    shapes.append(text(MARGIN, top + LINE, place, "soft"))
    words = "; ".join(
        f"{KINDS[point['kind']]}, {name} {point['value']:,}: {point['seconds']:.2f} s, "
        f"{point['memory'] / 1e9:.2f} GB"
        for name, same in curves.items()
        for point in same
    )
    title = "Time and memory of an update"
    height = top + LINE + MARGIN
    return Diagram("growth", title, f"{words}. {place}.", WIDTH, height, shapes)


def panel(
    left: float,
    top: float,
    scale: dict[float, float],
    points: Sequence[dict[str, Any]],
    heights: Sequence[float],
) -> Iterator[str]:
    """A line for each kind of adapter, over the logarithm of the values.

    Args:
        scale: label -> height of the lines of the grid.
        heights: of the points, in the unit of the scale.
    """
    start = left + 34
    width = WIDTH / 2 - 34 - 3 * MARGIN
    places = sorted({math.log2(point["value"]) for point in points})
    span = places[-1] - places[0] or 1

    def x(point: dict[str, Any]) -> float:
        share = (math.log2(point["value"]) - places[0]) / span
        return start + MARGIN + (width - 2 * MARGIN) * share

    def y(height: float) -> float:
        low, *_, high = scale.values()
        return top + PANEL * (1 - (height - low) / (high - low))

    for label, height in scale.items():
        line = f'x1="{start:g}" x2="{start + width:g}" y1="{y(height):g}" y2="{y(height):g}"'
        yield f'<line class="grid" {line}/>'
        yield text(start - 6, y(height) + 4, f"{label:g}", "soft end")
    for number, kind in enumerate(KINDS):
        line = [
            (x(point), y(height))
            for point, height in zip(points, heights, strict=True)
            if point["kind"] == kind
        ]
        corners = " ".join(f"{across:g},{down:g}" for across, down in line)
        yield f'<polyline class="line{number}" points="{corners}"/>'
        for across, down in line:
            yield f'<circle class="part{number}" cx="{across:g}" cy="{down:g}" r="3"/>'
    free = WIDTH  # left of the last label; one that finds no room is left out
    for value, point in sorted({point["value"]: point for point in points}.items(), reverse=True):
        half = LETTER * len(f"{value:,}") / 2
        if x(point) + half < free:
            free = x(point) - half
            yield text(x(point), top + PANEL + LINE, f"{value:,}", "soft middle")


def diagrams() -> list[Diagram]:
    return [floors(), terminal(), memory(), update(), growth(json.loads(GROWTH.read_text()))]
