"""GGUF files as models: the numbers they stand for, kept, made anew when a file changes, and what cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nnsplice as ns
from models import quantised
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, FileError, MissingPackage, WriteFailed
from nnsplice.models import conversion_cache, dequantise, published

pytest.importorskip("gguf")
TEXT = " the cat sat the"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NNSPLICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.Q4_1.gguf"
    quantised.write(path)
    return path


def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are converted from now on."""
    seen: list[Path] = []
    real = dequantise._read

    def counted(path: Path) -> Any:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(dequantise, "_read", counted)
    return seen


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "models").iterdir()) if (cache / "models").exists() else []


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_a_model_has_the_numbers_that_its_file_stands_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    expected = quantised.write(path, kind=kind)
    model = ns.load(path)
    found = unwrap(model).state_dict()
    assert set(found) == {*expected, "lm_head.weight"}
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
    assert torch.equal(found["lm_head.weight"], expected["model.embed_tokens.weight"])


def test_it_runs_as_the_same_model_made_by_hand(file: Path, tmp_path: Path) -> None:
    import transformers as hf

    by_hand = hf.LlamaForCausalLM(quantised.config()).eval()
    by_hand.load_state_dict(quantised.write(tmp_path / "again.gguf"), strict=False)
    by_hand.tie_weights()
    model = ns.load(str(file))
    ids = model.tokenizer(TEXT)["input_ids"]
    assert len(ids) == 4, "the file's own merges"
    with torch.no_grad():
        states = by_hand(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
    saved = ns.capture(model, TEXT, "layers[0].output[-1]")
    torch.testing.assert_close(saved["layers[0].output[-1]"], states[:, -1])
    assert (saved.model, model.tokenizer.decode(ids)) == (str(file), TEXT)


def test_it_says_which_types_of_numbers_the_file_held(file: Path) -> None:
    config: Any = unwrap(ns.load(file)).config
    assert config.dequantised_from == {"file": "tiny.Q4_1.gguf", "types": {"Q4_1": 15, "F32": 5}}


def test_arguments_reach_it(file: Path) -> None:
    model = ns.load(file, dtype=torch.bfloat16, attn_implementation="eager")
    assert next(unwrap(model).parameters()).dtype == torch.bfloat16
    assert model.attn_implementation == "eager"


def test_a_file_of_a_folder_is_named_by_gguf_file(file: Path, tmp_path: Path) -> None:
    for folder in (str(tmp_path), tmp_path):
        model = ns.load(folder, gguf_file=file.name)
        assert ns.capture(model, TEXT, "layers[0].output[-1]").model == f"{tmp_path}/{file.name}"


def test_its_module_finds_its_tokenizer_again(file: Path) -> None:
    module = unwrap(ns.load(file))
    assert ns.load(module).tokenizer(TEXT)["input_ids"] == ns.load(file).tokenizer(TEXT)["input_ids"]


# ------------------------------------------------------------------------------------------------------------ the cache


def test_it_is_converted_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = conversions(monkeypatch)
    first, second = ns.load(file), ns.load(str(file))
    assert len(seen) == 1
    (folder,) = folders(cache)
    assert torch.equal(
        unwrap(first).state_dict()["model.norm.weight"], unwrap(second).state_dict()["model.norm.weight"]
    )
    told = json.loads((folder / "source.json").read_text())
    assert told["files"][0]["path"] == str(file) and told["types"] == {"Q4_1": 15, "F32": 5}
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "tied: stored once"


def test_the_cache_says_what_it_is(file: Path, cache: Path) -> None:
    ns.load(file)
    assert (cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert "can be deleted at any time" in (cache / "README.txt").read_text()


def test_a_file_that_has_changed_is_converted_anew(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ns.load(file)
    seen, times = conversions(monkeypatch), file.stat()
    expected = quantised.write(file, seed=1)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size, "neither the size nor the time tells"
    found = unwrap(ns.load(file)).state_dict()
    assert len(seen) == 1 and len(folders(cache)) == 1
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], expected["model.layers.1.mlp.up_proj.weight"])


def test_a_file_that_was_only_touched_is_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ns.load(file)
    seen = conversions(monkeypatch)
    os.utime(file)
    ns.load(file)
    assert seen == []


def test_another_transformers_converts_it_anew(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ns.load(file)
    (folder,) = folders(cache)
    told = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps({**told, "tool": "transformers 5.0.0"}))
    seen = conversions(monkeypatch)
    ns.load(file)
    assert len(seen) == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', ""])
def test_a_folder_that_does_not_say_what_it_is_is_made_anew(damage: str, file: Path, cache: Path) -> None:
    ns.load(file)
    (folder,) = folders(cache)
    (folder / "source.json").write_text(damage)
    ns.load(file)
    assert json.loads((folder / "source.json").read_text())["format"] == conversion_cache.FORMAT


def test_nothing_is_kept_when_nothing_is_to_be(file: Path, cache: Path) -> None:
    model = ns.load(file, cache=False)
    assert folders(cache) == []
    assert ns.capture(model, TEXT, "layers[0].output[-1]").model == str(file)
    assert torch.equal(unwrap(model).state_dict()["model.norm.weight"], torch.ones(quantised.WIDTH))


def test_what_an_interrupted_conversion_had_written_is_gone(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers as hf

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf.PreTrainedTokenizerBase, "save_pretrained", interrupted)  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            ns.load(file)
    assert folders(cache) == []
    assert ns.load(file) is not None


def test_what_a_killed_process_left_is_never_used_and_goes_after_a_day(file: Path, cache: Path) -> None:
    ns.load(file)
    (folder,) = folders(cache)
    young, old = (folder.with_name(f".{folder.name}.{word}.part") for word in ("young", "old"))
    for part in (young, old):
        part.mkdir()
    os.utime(old, (0, 0))
    shutil.rmtree(folder)
    ns.load(file)
    assert folders(cache) == [young, folder]


def test_two_processes_that_convert_at_once_both_get_it(file: Path, cache: Path) -> None:
    code = f"import nnsplice as ns; print(ns.capture(ns.load({str(file)!r}), ' the', 'layers[0].output[-1]').rows)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate(timeout=240)[0].strip() for one in both] == ["1", "1"]
    assert len(folders(cache)) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert conversion_cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("NNSPLICE_CACHE")
    assert conversion_cache.cache_root() == tmp_path / "xdg" / "nnsplice"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert conversion_cache.cache_root() == Path.home() / ".cache" / "nnsplice"


def test_a_disk_without_room_is_told_before_anything_is_converted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = conversions(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(WriteFailed, match=r"takes 0\.00 GB(.|\n)*NNSPLICE_CACHE"):
        ns.load(file)
    assert seen == []


def test_a_cache_that_is_a_file_is_told(file: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(WriteFailed, match=r"cannot be kept in(.|\n)*cache=False"):
        ns.load(file)
    assert ns.load(file, cache=False) is not None


# ---------------------------------------------------------------------------------------------------------- what cannot


def refused(kind: type[Exception], *parts: str, **asked: Any) -> None:
    with pytest.raises(kind) as error:
        ns.load(**asked)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_a_file_that_is_not_there_and_those_that_are(file: Path, tmp_path: Path) -> None:
    refused(FileError, "there is no such file", "tiny.Q4_1.gguf", name_or_module=tmp_path / "other.gguf")
    refused(FileError, "there is no such file", name_or_module="nowhere/other.gguf")
    refused(FileError, "there is no such file", name_or_module=tmp_path, gguf_file="other.gguf")


def test_a_folder_with_nothing_but_gguf_files_says_how_to_name_one(file: Path, tmp_path: Path) -> None:
    refused(FileError, f'ns.load("{tmp_path}", gguf_file="tiny.Q4_1.gguf")', name_or_module=tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 3, 20, 5000, -40])
def test_a_file_that_is_cut_off_is_refused_and_leaves_nothing(kept_bytes: int, file: Path, cache: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(FileError, match=r"no GGUF file|damaged|cut off"):
        ns.load(file)
    assert folders(cache) == []


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(FileError, "is no GGUF file", name_or_module=tmp_path / "x.gguf")


def test_a_control_vector_is_no_model(tmp_path: Path, model: Any) -> None:
    acts = ns.capture(model, ["w3 w4", "w5 w6"], "layers[1:].output[-1]")
    ns.steering.to_gguf(ns.steering.fit(acts.slice[0], acts.slice[1]), tmp_path / "v.gguf")
    refused(FileError, "makes no model of this file", "controlvector", name_or_module=tmp_path / "v.gguf")


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    # transformers fills them with random numbers and goes on.
    quantised.write(tmp_path / "x.gguf", lost="blk.1.ffn_up")
    refused(
        FileError, "does not read all of this file", "missing keys: model.layers.1.mlp.up_proj.weight",
        name_or_module=tmp_path / "x.gguf",
    )  # fmt: skip


def test_one_of_several_files_says_how_to_join_them(file: Path, tmp_path: Path) -> None:
    part = file.rename(tmp_path / "big-00001-of-00003.gguf")
    refused(FileError, "one of several files", "llama-gguf-split --merge", name_or_module=part)


def test_without_the_package_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dequantise.find_spec
    monkeypatch.setattr(dequantise, "find_spec", lambda name: None if name == "gguf" else real(name))
    refused(MissingPackage, 'pip install "nnsplice[gguf]"', name_or_module=file)


def test_arguments_that_would_do_nothing(file: Path, tmp_path: Path, model: Any) -> None:
    refused(BadArgument, "cache=False is about", name_or_module="toy", cache=False)
    refused(BadArgument, "gguf_file would do nothing", name_or_module="toy", gguf_file="x.gguf")
    refused(BadArgument, "gguf_file would do nothing", name_or_module=model, gguf_file="x.gguf")
    refused(BadArgument, "only here", name_or_module=file, remote=True)
    refused(FileError, "this is a file", name_or_module=file, gguf_file="x.gguf")
    refused(FileError, "neither here nor to be had", name_or_module="some/body", gguf_file="x.gguf")


# --------------------------------------------------------------------------------------------- models that are packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be imported and holds a model, under a name of the table."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its own needs are not installed')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    whole = folder / "tiny.gguf"
    quantised.write(whole)
    one = published.Published(
        "Tiny", ("tiny==1",), {"tiny_weights": "tiny.gguf"}, 1, "MIT", sha256=conversion_cache.sha256(whole)
    )
    monkeypatch.setattr(published, "PUBLISHED", {"smollm2": one})
    return folder


def test_a_package_is_a_model_by_name(package: Path) -> None:
    saved = ns.capture(ns.load("smollm2"), TEXT, "layers[0].output[-1]")
    assert saved.model == "smollm2" and "tiny_weights" not in sys.modules
    assert saved.allclose(ns.capture(ns.load(package / "tiny.gguf"), TEXT, "layers[0].output[-1]"))


def test_pieces_in_several_packages_are_joined(package: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    whole = (package / "tiny.gguf").read_bytes()
    other = package.with_name("tiny_more")
    other.mkdir()
    (other / "__init__.py").write_text("")
    (package / "tiny.gguf.part0").write_bytes(whole[:30000])
    (other / "tiny.gguf.part1").write_bytes(whole[30000:])
    known = published.PUBLISHED["smollm2"]
    files = {"tiny_weights": "tiny.gguf.part0", "tiny_more": "tiny.gguf.part1"}
    cut = published.Published("Tiny", ("a", "b"), files, 1, "MIT", sha256=known.sha256)
    monkeypatch.setattr(published, "PUBLISHED", {"smollm2": cut})
    saved = ns.capture(ns.load("smollm2"), TEXT, "layers[0].output[-1]")
    assert saved.allclose(ns.capture(ns.load(package / "tiny.gguf"), TEXT, "layers[0].output[-1]"))
    shutil.rmtree(cache)
    (other / "tiny.gguf.part1").write_bytes(whole[30000:-1] + b"x")
    refused(FileError, "are damaged", "nnsplice fetch smollm2 --again", name_or_module="smollm2")


def test_a_package_that_is_missing_says_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = published.Published("Tiny", ("no-such==1",), {"no_such_package": "x.gguf"}, 12, "MIT")
    monkeypatch.setattr(published, "PUBLISHED", {"smollm2": gone})
    refused(FileError, "not installed", "12 MB, MIT", "nnsplice fetch smollm2", name_or_module="smollm2")


def test_every_model_of_the_table_says_what_a_user_has_to_know() -> None:
    for model in published.PUBLISHED.values():
        assert all("==" in each for each in model.requirements) and len(model.files) == len(model.requirements)
        assert model.licence and model.megabytes and len(model.sha256) == 64
