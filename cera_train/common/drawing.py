"""How pictures look, as PNG for files and as SVG inside a page, where it follows the reader's light or dark. Methods
differ in colour (Okabe and Ito's palette, for colour-blind readers) and marker, runs of a method in marker and dash."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SIZE = (4.5, 3.1)  # inches, without the legend: on a telephone the text is still large enough
LEGEND_LINE = 0.2  # inches
LONGEST_LABEL = 48

TEXT, GRID, BACKGROUND = "#1f2328", "#d9dde2", "#ffffff"
COLORS = {
    **{"cera": "#0072b2", "lora": "#c04a00", "rslora": "#00795a"},
    **{"dora": "#a8437f", "base": "#5f6670", "other": "#7a5c00"},
}
VARIABLES = {TEXT: "text", GRID: "line", BACKGROUND: "card"} | {color: name for name, color in COLORS.items()}
"""The CSS variable of each colour."""
MARKERS = {"cera": "o", "lora": "s", "rslora": "^", "dora": "D", "base": "v", "other": "h"}
MORE_MARKERS = ["P", "X", "*", "p"]
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
LINE = {"markersize": 5.5, "linewidth": 1.5}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), BACKGROUND),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "font.size": 10.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a run may be named $x$
    "svg.fonttype": "none",  # text stays text
}


@dataclass(frozen=True)
class Picture:
    name: str  # the stem of its file
    title: str
    alt: str
    caption: str
    draw: Callable[..., None]  # into matplotlib axes, one for each panel
    height: float = SIZE[1]  # inches, without the legend
    panels: int = 1  # side by side, with one y axis


def render(picture: Picture, file_format: str) -> bytes:
    """The picture as `png` or `svg`, the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": picture.name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        (axes,) = figure.subplots(1, picture.panels, sharey=True, squeeze=False)
        picture.draw(*axes)
        handles, labels = axes[0].get_legend_handles_labels()
        columns = 2 if max(map(len, labels), default=0) <= LONGEST_LABEL // 2 else 1
        figure.set_figheight(picture.height + LEGEND_LINE * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        stream = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(stream, format=file_format, dpi=180, metadata=metadata)
        return stream.getvalue()


def inline_svg(picture: Picture) -> tuple[str, str]:
    """The view box and the content of an SVG element that takes its colours and its font from the page around it."""
    svg = render(picture, "svg").decode()
    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', svg)
    content = svg[opening.end() : svg.rindex("</svg>")]
    # The page has the style sheet, and the names of groups would repeat from picture to picture.
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    for color, name in VARIABLES.items():
        content = content.replace(color, f"var(--{name})")
    return opening[1], content


def color_name(kind: str) -> str:
    """The name of a method's colour, in COLORS and as a CSS variable."""
    return kind if kind in COLORS else "other"


def styles_of(kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Arguments for `Axes.plot` that tell lines apart, from the kind of adapter of each line."""
    styles: dict[str, dict[str, Any]] = {}
    used = dict.fromkeys(COLORS, 0)
    for name, kind in kinds.items():
        color = color_name(kind)
        markers = [MARKERS[color], *MORE_MARKERS]
        marker, dash = markers[used[color] % len(markers)], DASHES[used[color] % len(DASHES)]
        styles[name] = LINE | {"color": COLORS[color], "marker": marker, "linestyle": dash}
        used[color] += 1
    return styles


def shortened(text: str) -> str:
    """A label for a legend."""
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 13]}…{text[-12:]}"
