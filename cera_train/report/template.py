"""The templates of pages and pictures: HTML and SVG escape what they are given, Markdown by its
filter."""

import jinja2

from cera_train.common.trust import clean, for_markdown


def load_template(name: str, package: str = "cera_train.report") -> jinja2.Template:
    """A file of the package's folder templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=lambda name: name.endswith((".html.jinja", ".svg.jinja")),
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = for_markdown
    return environment.get_template(f"{name}.jinja")
