"""What a capture shows of itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given

import nnsplice as ns
from activations.captures import captures, hand
from nnsplice.activations.display import SHOWN, size


class Cells(HTMLParser):
    """The text of every cell of a table, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_first_line_says_sites_positions_rows_dtype_and_bytes() -> None:
    saved = hand("layers[0].output[0]", "layers[1].output[0]", dtype=torch.float32)
    assert repr(saved).splitlines() == [
        "SavedActivation: 2 sites, 1 position each, 2 rows, float32, 64 B",
        "  layers[0..1].output  [0]  width 4",
    ]
    one = hand("layers[0].output[0]", rows=1, width=1, dtype=torch.bfloat16)
    assert repr(one).startswith("SavedActivation: 1 site, 1 position each, 1 row, bfloat16, 2 B\n")
    mixed = ns.SavedActivation.from_pairs(
        ("layers[0].output[0]", torch.zeros(2, 4)),
        ("layers[1].output[0]", torch.zeros(2, 4).half()),
        ("layers[1].output[1]", torch.zeros(2, 4).half()),
    )
    assert repr(mixed).startswith("SavedActivation: 2 sites, positions by site, 2 rows, float16, float32, 64 B\n")
    assert "meta" in repr(mixed.to("meta"))


def test_an_empty_capture_says_so() -> None:
    assert repr(ns.SavedActivation()) == "SavedActivation: empty"
    assert "empty" in ns.SavedActivation()._repr_html_()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.536 kB"), (2_500_000, "2.5 MB"), (7 * 10**12, "7000 GB")],
)
def test_bytes_as_a_person_says_them(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (["layers[0].output[0]", "layers[2].output[0]", "layers[5].output[0]"], ["layers[0,2,5].output  [0]"]),
        (
            ["layers[0].heads[0].output[0]", "layers[1].heads[3].output[0]"],
            ["layers[0..1].heads[0,3].output (2 of these places)  [0]"],
        ),
        (["encoder.layers[0].output[0]", "layers[0].output[0]"], ["encoder.layers[0].output  [0]", "layers[0].output"]),
        (
            ["model.h[0].attn.output[0][-1]", "model.h[0].attn.output[1][-1]"],
            ["model.h[0].attn.output[0]  [-1]", "model.h[0].attn.output[1]  [-1]"],
        ),
        (["layers[0].output[0]", "model.layers[0].output[0]"], ["layers[0].output", "model.layers[0].output"]),
        (["layers[-1].output[0]", "layers[0].output[0]"], ["layers[-1,0].output"]),
        (["layers[0].output[0]", "layers[0].input[0]"], ["layers[0].output  [0]", "layers[0].input  [0]"]),
        (['layers[0].output["a b"][-1]'], ['layers[0].output  ["a b"][-1]']),
        (
            [f"layers[{layer}].output[{p}]" for layer in range(2) for p in [*range(6), *([6] * layer)]],
            ["layers[0].output  [0] ... [5] (6 positions)", "layers[1].output  [0] ... [6] (7 positions)"],
        ),
    ],
)
def test_no_site_is_lost_where_places_share_a_line(keys: list[str], lines: list[str]) -> None:
    shown = repr(hand(*keys)).splitlines()[1:]
    assert len(shown) == len(lines)
    assert all(found.strip().startswith(line) for found, line in zip(shown, lines, strict=True)), shown


def test_many_kinds_of_place_are_cut_with_their_count() -> None:
    saved = hand(*(f"model.block{n}.output[0]" for n in range(SHOWN + 5)))
    lines = repr(saved).splitlines()
    assert len(lines) == 1 + SHOWN + 1 and lines[-1] == "  ... and 5 more kinds of place"
    cells = Cells(saved._repr_html_()).cells
    assert len(cells) == 3 * SHOWN + 1 and "... and 5 more" in cells[-1]
    assert "more" not in repr(hand(*(f"model.block{n}.output[0]" for n in range(SHOWN))))


@given(captures())
def test_the_table_has_the_words_of_the_text(saved: ns.SavedActivation) -> None:
    text, cells = repr(saved).splitlines(), Cells(saved._repr_html_()).cells
    assert [re.split(" {2,}", line.strip()) for line in text[1:]] == [cells[n : n + 3] for n in range(0, len(cells), 3)]


def test_names_are_escaped_in_the_table() -> None:
    saved = hand('layers[0].output["<script>alert(1)</script> & co"][0]')
    html = saved._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp; co" in html
    assert Cells(html).cells[1] == '["<script>alert(1)</script> & co"][0]'
