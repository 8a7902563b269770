"""Templates of HTML and Markdown pages; page.html.jinja has the style of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cera_train.common.drawing import color_name, inline_svg
from cera_train.common.trust import clean


def template(package: str, name: str, **filters: Callable[[Any], Any]) -> Any:
    """The template NAME.jinja of a package's folder `templates`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(place) for place in (package, "cera_train.common")]),
        autoescape=name.endswith(".html"),
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": inline_svg, "color": color_name} | filters
    return environment.get_template(f"{name}.jinja")
