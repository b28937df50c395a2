"""What texts are paths, what they mean, and that a path prints back to a text that means the same."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsplice import errors
from nnsplice.paths import Path, Slice, Span, Step, parse_path, reads
from nnsplice.paths.hooks import HOOKS, REFUSED

# ----------------------------------------------------------------------------------------------- every path there is

numbers = st.integers(-(10**9), 10**9)
edges = st.none() | numbers
slices = st.builds(Slice, edges, edges, st.none() | numbers.filter(bool))
indices = numbers | slices | st.lists(numbers, min_size=1, max_size=4).map(tuple)
span_names = st.text(min_size=1) | st.text("\"\\\n\t[]:'n", min_size=1)
positions = indices | st.builds(Span, span_names, st.none() | numbers)


@st.composite
def native_paths(draw: st.DrawFn) -> Path:
    names = st.sampled_from(
        ["transformer", "h", "E_x", "attn", "größe", "output", "input", "inputs", "weight", "model"]
    )
    value = draw(st.sampled_from([None, "output", "input", "weight", "bias"]))
    # The model alone is no site: it has a value, or names of parts.
    least = 1 if value is None else 0
    steps = tuple(draw(st.lists(st.builds(Step, names, st.none() | indices), min_size=least, max_size=4)))
    if value not in ("output", "input"):
        return Path(steps, native=True, value=value)
    return Path(steps, True, None, value, draw(st.none() | numbers), draw(st.none() | positions))


@st.composite
def portable_paths(draw: st.DrawFn) -> Path:
    tower = draw(st.sampled_from([None, "encoder", "decoder"]))
    values = ["output", "input", "weight", "bias"]
    if draw(st.booleans()):
        steps = (Step(draw(st.sampled_from(["embed", "final_norm", "unembed"]))),)
    else:
        layer = Step("layers", draw(indices))
        part = draw(st.sampled_from(["", "attn", "mlp", "heads", "groups", "experts", "neurons"]))
        steps = (layer,)
        if part in ("attn", "mlp"):
            inner = {"attn": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down", "router"]}[part]
            name = draw(st.sampled_from(["", *inner]))
            steps += (Step(part), Step(name)) if name else (Step(part),)
        elif part:
            steps += (Step(part, draw(indices)),)
        if part == "heads":
            values += ["q", "k", "v", "pattern"]
        elif part == "groups":
            values = ["k", "v", "weight", "bias"]
        elif not part:
            values += ["mid"]
    value = draw(st.none() | st.sampled_from(values))
    position = None if value in (None, "weight", "bias") else draw(st.none() | positions)
    return Path(steps, False, tower, value, None, position)


paths = native_paths() | portable_paths() | st.just(Path((Step("full"),)))


@given(paths)
def test_a_path_prints_a_text_that_parses_to_an_equal_path_with_an_equal_hash(path: Path) -> None:
    again = parse_path(str(path))
    assert again == path
    assert hash(again) == hash(path)
    assert str(again) == str(path)
    assert (again.steps, again.value, again.item, again.position) == (path.steps, path.value, path.item, path.position)


@given(paths)
def test_a_path_survives_pickling_with_its_text_and_hash(path: Path) -> None:
    copy = pickle.loads(pickle.dumps(path))
    assert copy == path
    assert hash(copy) == hash(path)
    assert str(copy) == str(path)


@given(paths, paths)
def test_two_paths_are_equal_exactly_when_their_texts_are(one: Path, other: Path) -> None:
    assert (one == other) == (str(one) == str(other))


@given(paths)
def test_the_place_of_a_path_prints_and_parses_back(path: Path) -> None:
    assert parse_path(str(path.place)) == path.place
    assert path.place.position is None


@given(paths, positions)
def test_a_path_moved_to_another_position_parses_back_or_is_refused(path: Path, position: object) -> None:
    try:
        moved = path.at(position)  # type: ignore[arg-type]
    except errors.PathError:
        open_group = path.value is None and path.steps[-1].name == "groups"
        assert path.value in ("weight", "bias") or str(path) == "full" or open_group
    else:
        assert parse_path(str(moved)) == moved


@given(st.text(max_size=40) | st.text("lh5[]:.\"-,'model.layershdstup \\", max_size=40))
def test_any_text_is_a_path_or_a_path_error(text: str) -> None:
    try:
        path = parse_path(text)
    except errors.PathError:
        assert not reads(text)
    else:
        assert reads(text)
        assert parse_path(str(path)) == path


# -------------------------------------------------------------------------------------------------- what texts mean

SAME = {
    # native: already canonical, or with spaces and other quotes
    "model.output[-1]": "model.output[-1]",
    "model.transformer.h[2].output[10]": "model.transformer.h[2].output[10]",
    "model.model.layers[3].self_attn.output[0][-1]": "model.model.layers[3].self_attn.output[0][-1]",
    "model.lm_head.output[:]": "model.lm_head.output[:]",
    "model.transformer.wte.weight": "model.transformer.wte.weight",
    "model.h[ 0 : 6 : 2 ].output[ 0, 4, -1 ]": "model.h[0:6:2].output[0,4,-1]",
    "model.h[::].output": "model.h[:].output",
    "model.h[007].output[-0]": "model.h[7].output[0]",
    "model.lm_head.output['subject'][-1]": 'model.lm_head.output["subject"][-1]',
    "model.attn.output[0]['subject'][-1]": 'model.attn.output[0]["subject"][-1]',
    "model.bert.layer[0].attention.E_output.dense.output[1]": "model.bert.layer[0].attention.output.dense.output[1]",
    "model.bert.layer[0].attention.E_output": "model.bert.layer[0].attention.E_output",
    "  model.lm_head \n": "model.lm_head",
    # portable
    "embed[-1]": "embed.output[-1]",
    "layers[5][-1]": "layers[5].output[-1]",
    "layers[5].attn[-1]": "layers[5].attn.output[-1]",
    "layers[5].attn.q[-1]": "layers[5].attn.q.output[-1]",
    "layers[5].heads[3].q": "layers[5].heads[3].q",
    "layers[[0,4]].output": "layers[0,4].output",
    "layers[0,]": "layers[0,]",
    "layers[[3]]": "layers[3,]",
    "layers[5].mid": "layers[5].mid",
    "layers[5].mlp.router": "layers[5].mlp.router",
    "Encoder.Layers[5].Attn.Q.OUTPUT[-1]": "encoder.layers[5].attn.q.output[-1]",
    "decoder.embed": "decoder.embed",
    "layers[5]['mean']": 'layers[5].output["mean"]',
    # short forms
    "l5": "layers[5]",
    "L5H3": "layers[5].heads[3]",
    "l5 h3": "layers[5].heads[3]",
    "l5g0": "layers[5].groups[0]",
    "L5 G0.v[-1]": "layers[5].groups[0].v[-1]",
    "l5 attn": "layers[5].attn",
    "l5 MLP[3:7]": "layers[5].mlp.output[3:7]",
    "L5H3.output[-1]": "layers[5].heads[3].output[-1]",
    "l5h3[-1]": "layers[5].heads[3].output[-1]",
    "l5h3.q": "layers[5].heads[3].q",
    "l5.mid": "layers[5].mid",
    "encoder.l5h3": "encoder.layers[5].heads[3]",
    "FULL": "full",
    "Unembed": "unembed",
    # hooks with a position
    "blocks.5.attn.hook_z[-1]": "layers[5].heads[:].output[-1]",
    'blocks.11.hook_resid_pre["subject"][0]': 'layers[11].input["subject"][0]',
}


@pytest.mark.parametrize(("text", "canonical"), SAME.items())
def test_a_text_is_read_as_its_canonical_spelling(text: str, canonical: str) -> None:
    assert str(parse_path(text)) == canonical
    assert parse_path(text) == parse_path(canonical)


def test_the_parts_of_a_native_path() -> None:
    path = parse_path('model.transformer.h[:].attn.output[0]["subject"][-1]')
    assert path.native
    assert path.tower is None
    assert path.steps == (Step("transformer"), Step("h", Slice()), Step("attn"))
    assert (path.value, path.item, path.position) == ("output", 0, Span("subject", -1))


def test_the_parts_of_a_portable_path() -> None:
    path = parse_path("encoder.layers[0,2].heads[-1].k[1:7:2]")
    assert not path.native
    assert path.tower == "encoder"
    assert path.steps == (Step("layers", (0, 2)), Step("heads", -1))
    assert (path.value, path.item, path.position) == ("k", None, Slice(1, 7, 2))


def test_one_bracket_after_a_native_value_is_a_position_and_an_open_one_makes_it_an_item() -> None:
    assert (parse_path("model.a.output[0]").item, parse_path("model.a.output[0]").position) == (None, 0)
    assert (parse_path("model.a.output[0][]").item, parse_path("model.a.output[0][]").position) == (0, None)


def test_a_projection_of_attention_is_a_place_and_q_of_a_head_is_a_value() -> None:
    assert parse_path("layers[5].attn.q").value is None
    assert parse_path("layers[5].attn.q").steps == (Step("layers", 5), Step("attn"), Step("q"))
    assert parse_path("layers[5].heads[3].q").value == "q"


def test_native_names_keep_their_case_and_an_output_before_the_end_is_an_attribute() -> None:
    path = parse_path("model.Encoder.output[1].Dense.weight")
    assert path.steps == (Step("Encoder"), Step("output", 1), Step("Dense"))
    assert path.value == "weight"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r'embed["a\"b"]', 'a"b'),
        (r"embed['it\'s']", "it's"),
        ("embed['a\"b']", 'a"b'),
        (r'embed["a\\n"]', r"a\n"),
        (r'embed["a\nb\tc"]', "a\nb\tc"),
        ('embed["a]b[0]"]', "a]b[0]"),
        ('embed["model.h.3 (x)"]', "model.h.3 (x)"),
    ],
)
def test_escapes_in_the_name_of_a_span(text: str, name: str) -> None:
    path = parse_path(text)
    assert path.position == Span(name)
    assert parse_path(str(path)) == path
    assert "\n" not in str(path)


def test_a_path_is_its_own_parse_and_a_text_is_read_once() -> None:
    path = parse_path("layers[5].output[-1]")
    assert parse_path(path) is path
    assert parse_path("layers[5].output[-1]") is path


@pytest.mark.parametrize("thing", [None, 5, b"layers[5]", ["layers[5]"]])
def test_another_type_than_text_or_path_is_a_type_error(thing: object) -> None:
    with pytest.raises(errors.BadType, match=type(thing).__name__):
        parse_path(thing)  # type: ignore[arg-type]


def test_importing_the_room_builds_no_parser() -> None:
    code = "import sys, nnsplice.paths; sys.exit('lark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize(("hook", "place"), HOOKS.items())
def test_each_hook_is_read_as_the_place_of_its_row(hook: str, place: str) -> None:
    assert str(parse_path(hook.format(n=7))) == place.format(n=7)
    assert parse_path(hook.format(n=7) + "[-1]") == parse_path(place.format(n=7) + "[-1]")


@pytest.mark.parametrize("hook", REFUSED)
def test_each_refused_hook_says_its_own_reason_and_what_it_suggests_is_a_path(hook: str) -> None:
    reason, write = REFUSED[hook]
    with pytest.raises(errors.RefusedPlace) as caught:
        parse_path(hook.format(n=7))
    assert str(caught.value).startswith(reason)
    assert write is None or all(reads(line.format(n=7)) for line in write.split(" or "))


def test_an_unknown_hook_is_answered_with_the_closest_names() -> None:
    with pytest.raises(errors.PathError, match=r"expected: .*blocks\.5\.attn\.hook_z"):
        parse_path("blocks.5.attn.hook_zz")
