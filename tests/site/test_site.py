"""The site is built without a warning, its links lead somewhere, and a browser shows it, searches it and darkens it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from browsers import chromium

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
made = importlib.import_module("made")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    pytest.importorskip("sphinx", reason="the group docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path_factory.mktemp("doctrees")), "docs", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert "WARNING" not in done.stderr
    return folder


class _Links(HTMLParser):
    """What a page links to, and the names that can be linked to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value and key == "id":
                self.names.add(value)
            if value and (tag, key) in {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")}:
                self.links.append(value)


def test_every_link_within_the_site_leads_to_a_page_and_a_heading_that_exist(site: Path) -> None:
    pages = {page: _Links(page) for page in site.rglob("*.html") if "_static" not in page.parts}
    lost = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            named = not parts.fragment or known is None or unquote(parts.fragment) in known.names
            if not target.exists() or not named:
                lost.append((str(page.relative_to(site)), link))
    assert len(pages) > 150
    assert lost == []


def test_every_public_name_has_one_page(site: Path) -> None:
    names = [name for group in made.groups(ROOT / "docs") for name in group.names]
    assert len(set(names)) == len(names)
    for group in made.groups(ROOT / "docs"):
        for name in group.names:
            page = (site / "reference" / "made" / group.file / f"{name}.html").read_text(encoding="utf-8")
            assert name.rpartition(".")[2] in page
    ns = importlib.import_module("nnsplice")
    rooms = {name for name in ns.__all__ if type(getattr(ns, name)).__name__ == "module"}
    assert {f"nnsplice.{name}" for name in ns.__all__ if name not in rooms} <= set(names)
    for room in rooms:
        module = importlib.import_module(f"nnsplice.{room}")
        offered = {f"nnsplice.{room}.{name}" for name in module.__all__}
        assert offered <= set(names), room


def test_every_command_stands_on_the_page_of_commands(site: Path) -> None:
    page = (site / "reference" / "made" / "commands.html").read_text(encoding="utf-8")
    for command in ("trace", "check", "paths", "convert", "circuit find", "steer sweep"):
        assert f"nnsplice {command}" in page
    assert "--max-tokens" in page


def test_prose_in_docstrings_is_marked_for_the_site_and_sessions_are_not() -> None:
    lines = ["* a `x` and |y| * z", "", ">>> a = `b`", "prints | and *", "", "all *args"]
    made.docstrings(None, "function", "f", len, None, lines)
    assert lines == ["* a ``x`` and \\|y\\| \\* z", "", ">>> a = `b`", "prints | and *", "", "all \\*args"]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_figures_of_tutorials_are_shown(browser: Any, address: str) -> None:
    browser.get(f"{address}/tutorials/made/rome.html")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('article img')].map(i => [i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) >= 2
    assert all(natural > 300 and shown > 200 for natural, shown in sizes)
    assert _errors(browser) == []


def test_the_search_finds_a_function_by_its_name(browser: Any, address: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q=causal_trace")
    found = WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#search-results li a"))
    assert any("nnsplice.causal_trace" in str(link.get_attribute("href")) for link in found)
    assert _errors(browser) == []


def test_the_page_has_a_light_and_a_dark_look(browser: Any, address: str) -> None:
    browser.get(f"{address}/index.html")
    colours = []
    for mode in ("light", "dark"):
        browser.execute_script(f"document.documentElement.dataset.theme = '{mode}'")
        seen = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        colours.append([_brightness(colour) for colour in seen])
    (light_page, light_text), (dark_page, dark_text) = colours
    assert light_page > 200 > 100 > light_text
    assert dark_page < 60 < 150 < dark_text


def _brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_lines_of_code_fit_the_page(browser: Any, address: str) -> None:
    browser.get(f"{address}/howto/patch-a-head.html")
    wide = browser.execute_script(
        "return [...document.querySelectorAll('pre')].map(p => p.scrollWidth - p.clientWidth)"
    )
    assert wide
    assert max(wide) <= 0
