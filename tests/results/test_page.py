"""The page stands by itself, takes any token for a text, and says what a cell is when it is pointed at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browsers import chromium
from nnsplice.errors import BadArgument
from nnsplice.results import Cell, SweepResult
from results.tables import HEAD, STREAM, head_cells, stream_cells, table

NASTY = (
    "</script><b>$x",
    ' "quoted"\\',
    "<!--",
    "@@\u2028${1}\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
)


def _page(folder: Path, result: SweepResult) -> Path:
    result.to_html(folder / "page.html")
    return folder / "page.html"


def _nasty() -> SweepResult:
    made = table(stream_cells(), (NASTY,), corrupted=np.array([-1.0]))
    made.values[0, 5] = np.nan
    return SweepResult(replace(made, asked={**made.asked, "model": "<img src=x onerror=alert(1)>"}))


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    for result in (SweepResult(table()), _nasty()):
        text = _page(tmp_path, result).read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>")
        addresses = set(re.findall(r"https?://[^\"'\s]*", text)) - {"http://www.w3.org/2000/svg"}  # a name, not loaded
        assert not addresses
        assert not re.search(r"\b(?:src|href)\s*=\s*[\"']?\w", text.replace("img src=x", ""))
        assert "@import" not in text and "url(h" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_no_text_ends_the_data(tmp_path: Path) -> None:
    text = _page(tmp_path, _nasty()).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert "<" not in found[1]
    told = json.dumps(json.loads(found[1]), ensure_ascii=False)
    for token in NASTY:
        assert json.dumps(token, ensure_ascii=False)[1:-1] in told
    assert text.count("</script>") == 2 and "<img" not in text and "<b>$x" not in text


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


def _open(browser: Any, path: Path) -> None:
    browser.get(path.as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def _hover(browser: Any, path: str) -> str:
    """What the page says of a cell that is pointed at."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    cell = next(
        n for n in browser.find_elements(By.CSS_SELECTOR, "[data-path]") if n.get_attribute("data-path") == path
    )
    ActionChains(browser).move_to_element(cell).perform()
    about = browser.find_element(By.ID, "about")
    assert about.is_displayed()
    return str(about.text)


def _choose(browser: Any, select: str, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    box = Select(browser.find_element(By.ID, select))
    box.select_by_visible_text(next(o.text for o in box.options if text in o.text))


def _count(browser: Any) -> int:
    from selenium.webdriver.common.by import By

    return len(browser.find_elements(By.CSS_SELECTOR, "[data-path]"))


def test_a_cell_says_what_it_is(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    result = SweepResult(table())
    _open(browser, _page(tmp_path, result))
    _choose(browser, "kind", STREAM)
    _choose(browser, "prompt", "the cat")
    assert _count(browser) == 8
    said = _hover(browser, "layers[1].output[2]")
    value = result.table.values[0, 6]
    for part in ("layers[1].output[2]", "layer", "position", '"the"', "logit_diff", f"{abs(value):.3g}"[:4]):
        assert part in said
    effect = float(result.effect(STREAM, per_prompt=True)[0, 1, 2])  # of the prompt that was chosen
    assert f"{abs(effect):.4g}"[:5] in said
    # The other prompt is shorter, and the other kind of site has heads.
    _choose(browser, "prompt", "the dog")
    assert _count(browser) == 6
    _choose(browser, "kind", HEAD)
    assert _count(browser) == 6
    assert "head" in _hover(browser, "layers[0].heads[2].output[-1]")
    # Away from the figure nothing is said.
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_element(By.ID, "title")).perform()
    assert not browser.find_element(By.ID, "about").is_displayed()


def test_any_token_is_a_text(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    _open(browser, _page(tmp_path, _nasty()))
    assert "</script><b>$x" in _hover(browser, "layers[0].output[0]")
    assert _count(browser) == 7  # one is not a number
    assert not browser.find_elements(By.TAG_NAME, "img") and not browser.find_elements(By.CSS_SELECTOR, "b b, span b")


@pytest.mark.parametrize("kind", ["spans", "both", "one", "flat", "none", "groups"])
def test_every_kind_of_result_is_drawn(browser: Any, tmp_path: Path, kind: str) -> None:
    spans = [Cell(f'layers[{n}].output["s"]', STREAM, layer=n, position='"s"') for n in (0, 1)]
    groups = [
        Cell(f"layers[{n}].groups[{g}].k[-1]", "layers[:].groups[:].k", layer=n, group=g, position=-1)
        for n in (0, 1)
        for g in (0, 1)
    ]
    whole = table(stream_cells())
    made = {
        "spans": table(spans),
        "both": table(head_cells((0, 1, 2))),
        "one": table([Cell("embed.output[:]", "embed.output")]),
        "flat": replace(whole, corrupted=whole.clean),
        "none": replace(whole, done=~whole.exists, values=np.full_like(whole.values, np.nan)),
        "groups": table(groups),
    }[kind]
    _open(browser, _page(tmp_path, SweepResult(made)))
    expected = {"spans": 2, "both": 18, "one": 1, "flat": 8, "none": 0, "groups": 4}
    assert _count(browser) == expected[kind]


# --- the experiment, a head's pattern, top tokens


def _experiment() -> SweepResult:
    made = table([*stream_cells(), *head_cells()], (("the", " cat", "the", " sat"),))
    values = np.full_like(made.values, made.corrupted[0])
    span = made.clean[0] - made.corrupted[0]
    values[0, 0], values[0, 1] = made.corrupted[0] + 0.5 * span, made.corrupted[0] + 0.015 * span
    asked = {
        **made.asked, "model": "/home/somebody/models/toy",
        "metric": {"name": "logit_diff", "position": -1, "ids": {"answer": [3], "wrong": [4]}},
    }  # fmt: skip
    labels = {"words": {"3": " Paris", "4": " Berlin"}, "clean": [["the", " dog", "the", " sat"]]}
    return SweepResult(replace(made, values=values, asked=asked, labels=labels))


class _Saved(dict[str, Any]):
    """What a capture of patterns is to a page: paths with tensors."""


def _patterns() -> Any:
    import torch

    shares = torch.tril(torch.ones(4, 4)).softmax(-1)
    return _Saved({f"layers[0].heads[1].pattern[{query}]": shares[query][None] for query in range(4)})


def test_the_page_names_the_experiment_and_no_folder_of_a_machine(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    path = _page(tmp_path, _experiment())
    assert "somebody" not in path.read_text(encoding="utf-8")
    _open(browser, path)
    _choose(browser, "kind", STREAM)
    assert '" Paris" - " Berlin" (logit_diff)' in browser.find_element(By.ID, "title").text
    assert browser.find_element(By.ID, "clean-text").text == "the dogthe sat"
    marked = [span.text for span in browser.find_elements(By.CSS_SELECTOR, "span.differs")]
    assert [text.strip() for text in marked] == ["dog", "cat"]
    written = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#figure svg text")]
    assert "dog -> cat" in written
    inside = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "text.inside")]
    assert inside == ["0.50"]  # 0.015 is no number to look at


def test_a_click_on_a_head_shows_its_pattern(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    _experiment().to_html(tmp_path / "page.html", patterns=_patterns())
    _open(browser, tmp_path / "page.html")
    _choose(browser, "kind", HEAD)
    pattern = browser.find_element(By.ID, "pattern")
    assert not pattern.is_displayed()
    assert "click for its pattern" in _hover(browser, "layers[0].heads[1].output[-1]")
    ActionChains(browser).click().perform()
    assert pattern.is_displayed() and "layer 0, head 1" in pattern.text.lower()
    cells = pattern.find_elements(By.CSS_SELECTOR, "[data-query]")
    drawn = [float(cell.get_attribute("fill-opacity")) for cell in cells]
    np.testing.assert_allclose(np.reshape(drawn, (4, 4)), [_patterns()[p][0].numpy() for p in _patterns()], atol=1e-3)
    # A head without one closes it.
    assert "click" not in _hover(browser, "layers[1].heads[2].output[-1]")
    ActionChains(browser).click().perform()
    assert not pattern.is_displayed()


def test_top_tokens_stand_beside_a_cell(browser: Any, tmp_path: Path) -> None:
    tops = {"layers[0].output[1]": [[" Paris", "<b>Rome</b>"]]}
    _experiment().to_html(tmp_path / "page.html", tokens=tops)
    _open(browser, tmp_path / "page.html")
    _choose(browser, "kind", STREAM)
    assert '" Paris" "<b>Rome</b>"' in _hover(browser, "layers[0].output[1]")
    assert "top tokens" not in _hover(browser, "layers[0].output[2]")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"patterns": {}}, "no patterns"),
        ({"tokens": {"layers[9].output[0]": [[" Paris"]]}}, "no cell"),
        ({"tokens": {"layers[0].output[1]": []}}, "for 0 prompts"),
    ],
)
def test_what_fits_no_cell_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        _experiment().to_html(tmp_path / "page.html", **more)
    assert not list(tmp_path.iterdir())
