"""The page of a circuit stands by itself, takes any text for a text, and draws as many edges as the slider says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import nnsplice as ns
from nnsplice.circuits.shape import LayerShape, Shape
from results.test_page import NASTY, browser  # noqa: F401  # a fixture

SHAPE = Shape((LayerShape(4, 2, parallel=False),) * 2)
EDGES = [
    ("embed", "layers[0].heads[1].q"),
    ("embed", "layers[0].groups[0].v"),
    ("layers[0].heads[1]", "layers[1].mlp"),
    ("layers[1].mlp", "unembed"),
    ("embed", "unembed"),
]
SCORES = (0.5, -2.0, 1.5, 0.25, -0.125)


def circuit(**more: Any) -> ns.Circuit:
    return ns.Circuit("edges", (), tuple(EDGES), SCORES, SHAPE, **more)  # type: ignore[arg-type]


def written(folder: Path, one: ns.Circuit) -> Path:
    one.to_html(folder / "circuit.html")
    return folder / "circuit.html"


def nasty() -> ns.Circuit:
    return circuit(provenance={"model": "".join(NASTY) + "<img src=x onerror=alert(1)>", "method": "</script>"})


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    for one in (circuit(), nasty(), ns.Circuit.of(nodes=["embed"])):
        text = written(tmp_path, one).read_text(encoding="utf-8")
        assert not set(re.findall(r"https?://[^\"'\s]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not re.search(r"\b(?:src|href)\s*=\s*[\"']?\w", text.replace("img src=x", ""))
        assert "@import" not in text and "url(h" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["circuit.html"]


def test_no_text_ends_the_data(tmp_path: Path) -> None:
    text = written(tmp_path, nasty()).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found and "<" not in found[1]
    assert json.loads(found[1])["about"].startswith("".join(NASTY))
    assert text.count("</script>") == 2 and "<img" not in text


def _open(driver: Any, path: Path) -> None:
    driver.get(path.as_uri())
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def _shown(driver: Any) -> list[str]:
    from selenium.webdriver.common.by import By

    found = driver.find_elements(By.CSS_SELECTOR, "[data-edge]")
    return [e.get_attribute("data-edge") for e in found if e.value_of_css_property("display") != "none"]


def _pointed_at(driver: Any, selector: str) -> str:
    from selenium.webdriver.common.by import By

    driver.execute_script(
        "document.querySelector(arguments[0]).dispatchEvent(new PointerEvent('pointerenter'))", selector
    )
    about = driver.find_element(By.ID, "about")
    assert about.is_displayed()
    return str(about.text)


def test_the_slider_leaves_the_strongest_edges(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    from selenium.webdriver.common.by import By

    _open(browser, written(tmp_path, circuit()))
    order = sorted(range(5), key=lambda n: -abs(SCORES[n]))
    names = [" -> ".join(EDGES[n]) for n in order]
    assert _shown(browser) == names
    for k in (0, 2, 4):
        browser.execute_script(
            "const k = document.getElementById('k'); k.value = arguments[0]; k.dispatchEvent(new Event('input'))", k
        )
        assert _shown(browser) == names[:k]
        assert browser.find_element(By.ID, "count").text == f"{k} of 5"


def test_an_edge_and_a_node_say_what_they_are(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    _open(browser, written(tmp_path, circuit()))
    said = _pointed_at(browser, '[data-edge="embed -> layers[0].groups[0].v"]')
    assert "embed -> layers[0].groups[0].v" in said and "score -2" in said
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    head = browser.find_element(By.CSS_SELECTOR, '[data-node="layers[0].heads[1]"]')
    ActionChains(browser).move_to_element(head).perform()
    assert "1 edges in, 1 out" in browser.find_element(By.ID, "about").text
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "title")).perform()
    assert not browser.find_element(By.ID, "about").is_displayed()
    nodes = ns.Circuit.of(nodes=["embed", "layers[0].mlp"], scores=[0.0, 0.75])
    _open(browser, written(tmp_path, nodes))
    assert "score 0.75" in _pointed_at(browser, '[data-node="layers[0].mlp"]')


def test_any_text_is_a_text(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    from selenium.webdriver.common.by import By

    _open(browser, written(tmp_path, nasty()))
    assert "<img src=x onerror=alert(1)>" in browser.find_element(By.ID, "title").text
    assert not browser.find_elements(By.TAG_NAME, "img")


def test_a_circuit_is_drawn_as_marks_and_lines() -> None:
    axes = circuit().plot()
    assert len(axes.lines) == len(EDGES)
    wide = max(axes.lines, key=lambda line: line.get_linewidth())
    assert wide.get_linewidth() == pytest.approx(3.4)  # the edge of score -2
    assert {"embed", "a0.1", "m1", "unembed"} <= {text.get_text() for text in axes.texts}
    assert len(ns.Circuit.of(nodes=["embed", "layers[3].heads[2]"]).plot().lines) == 0
