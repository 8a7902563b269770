"""What every page of a report keeps to in a browser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def sound_page(browser: Any, path: Path, width: int, scheme: str) -> Iterator[tuple[Any, int]]:
    """A page with its details open, and its number of pictures, after what every page keeps to: no error, no request,
    pictures that follow the colours of the page, ids that are one each; at the end that it is no wider than the window.
    """
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    pictures = page.evaluate("""[...document.querySelectorAll('figure svg')].map(svg => [
        svg.getBoundingClientRect().width, svg.querySelectorAll('path, text').length, svg.ariaLabel.length,
        getComputedStyle(svg.querySelector('text')).fill, getComputedStyle(document.body).color,
        getComputedStyle(svg.querySelector('path')).fill])""")
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert all(width > 250 and marks > 20 and alt > 20 for width, marks, alt, *_ in pictures)
    assert {(text, background) for *_, text, _, background in pictures} == {
        ("rgb(31, 35, 40)", "rgb(255, 255, 255)") if scheme == "light" else ("rgb(230, 233, 238)", "rgb(22, 27, 34)")
    }  # a picture follows the page
    assert all(text == page_text for *_, text, page_text, _ in pictures)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(set(ids)) == len(ids)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    yield page, len(pictures)
    page.close()
