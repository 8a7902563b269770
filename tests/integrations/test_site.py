"""The site of `make docs`: links lead somewhere, nothing loads from elsewhere, pages fit a telephone and have the parts
that GitHub shows of the same files."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {"index": "README.md", "contributing": "CONTRIBUTING.md", "recipes": "recipes/README.md"}
"""Pages of the site that do not lie in docs/."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def pages_of(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))


def visit(page: Any, url: str) -> tuple[list[str], set[str]]:
    """The links of a page, and the places that a link may lead to."""
    page.goto(url, timeout=120_000)
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(link => link.href)")
    ids = page.evaluate("[...document.querySelectorAll('[id], a[name]')].map(each => each.id || each.name)")
    return links, {"", *ids}


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_every_page_is_sound_in_a_browser(site, address, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.extend([request.url] * is_elsewhere(request.url, address)))
    page.on("response", lambda response: problems.extend([response.url] * (response.status >= 400)))
    links, places = {}, {}
    for name in pages_of(site):
        links[name], places[name] = visit(page, address + name)
        if page.evaluate("document.documentElement.scrollWidth") > width:
            problems.append(f"{name} is wider than {width}")
    page.close()
    assert problems == []
    assert places.keys() >= {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    for name, targets in links.items():
        for target in targets:
            assert leads_somewhere(target, address, places, site), f"{name}: {target}"


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:"))


def leads_somewhere(target: str, address: str, places: dict[str, set[str]], site: Path) -> bool:
    """Whether a link leads to an anchor of a page, to a file of the site, or by https to another site."""
    file, _, anchor = target.removeprefix(address).partition("#")
    if is_elsewhere(target, address):
        return target.startswith("https://")
    if file.endswith(".html") or file == "":
        return unquote(anchor) in places.get(file or "index.html", ())
    return (site / file).is_file()


def test_the_search_finds_a_page(address, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address, timeout=120_000)
    page.locator("input[name=query]").fill("mixtures")
    page.locator(".md-search-result__link", has_text="Mixtures of experts").first.wait_for(timeout=120_000)
    page.close()


PARTS = ("h1", "h2", "h3", "p", "ul", "ol", "li", "table", "tr", "td", "pre", "code", "strong", "em", "img")


def parts_of(html: str) -> dict[str, int]:
    return {name: len(re.findall(rf"<{name}[ >]", html)) for name in PARTS}


def test_a_page_has_the_parts_that_github_shows(site):
    """GitHub's Markdown and the site's differ: in what a list may hold, and in what ends one."""
    from markdown_it import MarkdownIt  # rich needs it

    github = MarkdownIt("commonmark").enable("table")
    names = [*BESIDE, *(path.stem for path in (ROOT / "docs").glob("*.md"))]
    for name in names:
        source = (ROOT / BESIDE.get(name, f"docs/{name}.md")).read_text()
        article = re.search(r"<article.*?</article>", (site / f"{name}.html").read_text(), flags=re.DOTALL)[0]
        assert parts_of(article) == parts_of(github.render(source)), name
        assert r"\|" not in re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL), name
