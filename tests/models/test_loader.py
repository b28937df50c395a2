"""What can be loaded, and what is said about the rest."""

from __future__ import annotations

import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nnsplice as ns
import unusual
import zoo
from nnsplice import engine
from nnsplice.errors import BadArgument, BadType, FileError
from nnsplice.models import embedded, load, unwrap
from nnsplice.models.hub import PAUSE, check_reachable
from nnsplice.models.sources import EMBEDDED


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save("llama", folder)
    return folder


def save(family: str, folder: Path) -> None:
    module: Any = zoo.build(family)
    module.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)


# --------------------------------------------------------------------------------------------------- what can be loaded


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(name: str) -> None:
    model = load(name)
    assert engine.name_of(model) == (name, None), "not where this machine keeps it"
    assert ns.capture(model, "The Velmar Tower", "layers[0].output[-1]").model == name
    assert not model._module.training
    assert next(model._module.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_folder_of_an_embedded_model(name: str) -> None:
    assert type(load(embedded(name))._module) is type(load(name)._module)


def test_the_folder_of_no_embedded_model() -> None:
    with pytest.raises(BadArgument, match=r"no model 'gpt2' is embedded\n  expected: 'toy' or 'toy-llama'"):
        embedded("gpt2")


def test_arguments_reach_an_embedded_model() -> None:
    model = load("toy", dtype=torch.float64, attn_implementation="eager")
    assert next(model._module.parameters()).dtype == torch.float64
    assert ns.capture(model, "The Velmar Tower", "layers[0].heads[1].pattern[-1]").rows == 1


def test_every_load_is_a_model_of_its_own() -> None:
    one: Any = load("toy")
    two: Any = load("toy")
    with torch.no_grad():
        one._module.lm_head.weight.zero_()
    assert two._module.lm_head.weight.abs().max() > 0


def test_no_bar_is_shown_and_the_setting_stays(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    load("toy")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder(kind: Any, checkpoint: Path) -> None:
    model = load(kind(checkpoint))
    same = load(zoo.build("llama"), tokenizer=zoo.tokenizer())
    text, path = "w3 w4 w5", "layers[-1].output[-1]"
    assert model.tokenizer is not None
    torch.testing.assert_close(ns.capture(model, text, path)[path], ns.capture(same, text, path)[path])


def test_a_folder_beside_an_embedded_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.rename(checkpoint.parent / "toy")
    monkeypatch.chdir(checkpoint.parent)
    assert type(load("./toy")._module).__name__ == "LlamaForCausalLM"
    assert type(load("toy")._module).__name__ == "GPT2LMHeadModel"


def test_arguments_reach_a_checkpoint(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
    assert next(model._module.parameters()).dtype == torch.bfloat16
    assert model.attn_implementation == "eager"


def test_what_a_checkpoint_is_for_is_read_off_its_config(tmp_path: Path) -> None:
    for family, task in (("gpt2", "text-generation"), ("t5", "text-generation"), ("bert", "fill-mask")):
        save(family, tmp_path / family)
        kind = type(zoo.build(family))
        with warnings.catch_warnings():
            # nnsight says that BERT's own `output` stands under another name.
            warnings.simplefilter("ignore", UserWarning)
            model = load(tmp_path / family)
        assert (model.task, type(model._module)) == (task, kind)


def test_a_module_with_its_tokenizer() -> None:
    module = zoo.build("gpt2")
    model = load(module, tokenizer=zoo.tokenizer())
    assert model._module is module


def test_a_module_that_knows_its_checkpoint(checkpoint: Path) -> None:
    import transformers as hf

    module = hf.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert load(module).tokenizer("w3")["input_ids"] == [3]


def test_a_wrapped_model_comes_back(model: Any) -> None:
    assert load(model) is model


# ---------------------------------------------------------------------------------------------------------- what cannot


def said(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_an_unknown_name_offline() -> None:
    with pytest.raises(FileError) as error:
        load("gpt2")
    said(error, "'gpt2' is neither embedded nor a folder nor in this machine's cache", "HF_HUB_OFFLINE")
    said(error, 'ns.load("toy")')
    assert isinstance(error.value.__cause__, OSError)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[float]]]:
    """Puts a server that gives every request one answer, or none at all, in the hub's place; returns the pauses."""
    servers: list[HTTPServer] = []

    def put(status: int | None) -> list[float]:
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status or 500)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        if status is None:
            server.server_close()  # the port is free again, so connections are refused
        else:
            servers.append(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
        pauses: list[float] = []
        monkeypatch.setattr("time.sleep", pauses.append)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return pauses

    yield put
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("options", [{}, {"gguf_file": "model.gguf"}])
def test_an_unknown_name_without_a_connection_is_not_asked_for_again_and_again(hub: Any, options: Any) -> None:
    pauses = hub(None)
    with pytest.raises(FileError) as error:
        load("no/body", **options)
    said(error, "connect" if options else 'ns.load("toy")')
    assert pauses == [PAUSE]


def test_an_adapter_that_is_not_there_is_named(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, found in ((tmp_path / "empty", "no adapter_config.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(FileError) as error:
            load("toy", peft=str(path))
        said(error, found, str(path), "save_pretrained")
    pauses = hub(None)
    with pytest.raises(FileError) as error:
        load("toy", peft="no/body")
    said(error, "the adapter 'no/body'", "cannot be reached")
    assert pauses == [PAUSE]


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_any_answer_of_the_hub_is_a_connection(hub: Any, status: int) -> None:
    pauses = hub(status)
    check_reachable("no/body", "config.json", {})
    check_reachable("no hub has/such/names", "config.json", {})
    assert pauses == []


def test_what_is_cached_or_asked_offline_needs_no_connection(hub: Any, tmp_path: Path) -> None:
    pauses = hub(None)
    check_reachable("no/body", "config.json", {"local_files_only": True})
    folder = tmp_path / "models--no--body" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "models--no--body" / "refs").mkdir()
    (tmp_path / "models--no--body" / "refs" / "main").write_text("abc")
    check_reachable("no/body", "config.json", {"cache_dir": tmp_path})
    assert pauses == []
    with pytest.raises(ConnectionError):
        check_reachable("no/body", "config.json", {"cache_dir": tmp_path / "other"})


def test_a_name_that_the_hub_refuses(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(404)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError("no/body is not a valid model identifier\nand more lines")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refused)
    with pytest.raises(FileError) as error:
        load("no/body")
    said(error, "not a valid model identifier")
    assert "more lines" not in str(error.value)


def test_a_misspelt_embedded_name() -> None:
    with pytest.raises(FileError) as error:
        load("toyllama")
    said(error, 'ns.load("toy-llama")')


@pytest.mark.parametrize("thing", [None, 3, ["toy"], torch.zeros(2)])
def test_a_thing_that_is_no_model(thing: Any) -> None:
    with pytest.raises(TypeError) as error:
        load(thing)
    assert isinstance(error.value, BadType)
    said(error, f"{type(thing).__name__} is no model", "a folder with a checkpoint")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("s3://bucket/model", "a copy"), ("s3:/bucket/model.gguf", "a copy"), (Path("gs://bucket/model"), "a copy"),
        ("https://huggingface.co/gpt2/small/tree/main", 'ns.load("gpt2/small")'),
    ],
)  # fmt: skip
def test_an_address_is_no_model(name: Any, write: str) -> None:
    with pytest.raises(BadArgument, match="is an address") as error:
        ns.load(name)
    assert write in str(error.value)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("s3://bucket/adapter", "a copy"), (Path("gs://bucket/adapter"), "a copy"),
        ("https://huggingface.co/someone/lora/tree/main", 'peft="someone/lora"'),
    ],
)  # fmt: skip
def test_an_address_is_no_adapter(name: Any, write: str) -> None:
    with pytest.raises(BadArgument, match="is an address, and adapters are loaded from folders") as error:
        ns.load("toy", peft=name)
    assert write in str(error.value)


def test_an_empty_name() -> None:
    with pytest.raises(BadArgument, match="an empty name"):
        load("")


def test_a_module_that_is_not_from_transformers() -> None:
    own: Any = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 2)))
    model = load(own)
    assert unwrap(model) is own
    x = torch.randn(4, 5, 2)
    saved = ns.capture(model, x, "model.first.output[-1]")
    assert torch.equal(saved["model.first.output[-1]"], own.first(x)[:, -1])
    for given, message in (({"tokenizer": zoo.tokenizer()}, "no tokenizer"), ({"peft": "folder"}, "peft would do no")):
        with pytest.raises(BadArgument, match=message):
            load(nn.Linear(2, 2), **given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tokenizer", [None, False])
def test_a_module_without_a_tokenizer_takes_token_ids(tokenizer: Any) -> None:
    module = zoo.build("gpt2")
    model = load(module, tokenizer)
    ids = torch.tensor([[3, 9, 4]])
    saved = ns.capture(model, ids, "layers[1].output[-1]")
    with torch.no_grad():
        states = module(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(saved["layers[1].output[-1]"], states[:, -1])
    assert torch.equal(ns.patched_logits(model, [3, 9, 4], saved), module(ids).logits)
    with pytest.raises(BadArgument) as error:
        ns.capture(model, "w3 w9 w4", "layers[1].output[-1]")
    said(error, "this model has no tokenizer", "ns.load(module, tokenizer=tokenizer)")


def test_what_needs_a_tokenizer_is_refused_without_one(checkpoint: Path) -> None:
    with pytest.raises(BadArgument) as error:
        load(zoo.build("gpt2"), peft="some/adapter")
    said(error, "peft needs a tokenizer", "ns.load(module, tokenizer=tokenizer, peft=...)")
    with pytest.raises(BadArgument) as error:
        load(checkpoint, tokenizer=False)
    said(error, "tokenizer=False is for a module", "tokenizer=False)")


def test_shards_over_processes_are_refused_in_one(checkpoint: Path) -> None:
    with pytest.raises(BadArgument) as error:
        load(checkpoint, tp_plan="auto")
    said(error, "tp_plan shards a model over several processes, and this is one", 'device_map="auto"')


#: The embedding here, and layers on the disk.
DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip


def test_parts_on_the_disk_run_and_a_first_part_there_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    offloaded = load(checkpoint, device_map=DISK, offload_folder=str(tmp_path / "off"))
    assert any(parameter.is_meta for parameter in offloaded._module.parameters())
    place = "layers[2].output[-1]"
    found, here = (ns.capture(model, "w3 w4", place)[place] for model in (offloaded, load(checkpoint)))
    assert torch.equal(found, here)
    with pytest.raises((BadArgument, FileError)) as error:
        load(checkpoint, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    if isinstance(error.value, FileError):  # accelerate 1.1 itself refuses a model that lies on the disk as a whole
        said(error, "offload the whole model to the disk")
    else:
        said(error, "the model's first part on the disk", "the embedding on a device")


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_folder_of_a_model_that_sees_is_used_by_its_tokens(name: str, tmp_path: Path) -> None:
    module = unusual.build(name)
    module.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert type(model._module) is type(module)
    with torch.no_grad():
        states = module(torch.tensor([[3, 9, 4]]), output_hidden_states=True).hidden_states[2]
    saved = ns.capture(model, "w3 w9 w4", "layers[1].output[-1]")
    # A scale that is no parameter may be read in another precision.
    torch.testing.assert_close(saved["layers[1].output[-1]"], states[:, -1], rtol=1e-5, atol=1e-5)


def test_a_module_whose_checkpoint_is_out_of_reach() -> None:
    module: Any = zoo.build("gpt2")
    module.config._name_or_path = module.name_or_path = "no/body"
    with pytest.raises(FileError) as error:
        load(module)
    said(error, "'no/body'", "tokenizer=False, for prompts of token ids")


@pytest.mark.parametrize("make", [lambda folder: str(folder), lambda folder: folder])
def test_a_folder_without_a_checkpoint(make: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileError) as error:
        load(make(tmp_path))
    said(error, "no config.json, but notes.txt", str(tmp_path), "save_pretrained")


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_folder_with_a_part_of_a_checkpoint(lost: str, checkpoint: Path) -> None:
    (checkpoint / lost).write_text("{}") if lost == "config.json" else (checkpoint / lost).unlink()
    with pytest.raises(FileError) as error:
        load(checkpoint)
    said(error, "holds no whole checkpoint", str(checkpoint))


@pytest.mark.parametrize(
    ("heads", "cause"), [(0, "ZeroDivisionError: "), (3, "ValueError: `embed_dim` must be divisible")]
)
def test_a_folder_whose_config_makes_no_model(heads: int, cause: str, tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_head": heads}))
    with pytest.raises(FileError) as error:
        ns.load(str(tmp_path))
    said(error, cause, str(tmp_path))


def test_a_folder_whose_config_does_not_say_what_the_model_is_for(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    config = tmp_path / "config.json"
    told = json.loads(config.read_text())
    del told["architectures"]
    config.write_text(json.dumps(told))
    with pytest.raises(FileError) as error:
        ns.load(str(tmp_path))
    said(error, "names no architectures", 'task="text-generation"')
    assert ns.capture(ns.load(str(tmp_path), task="text-generation"), "w3", "layers[0].output[-1]")


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(FileError):
        ns.load("a" * 5000)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(FileError, match="there is no such folder"):
        load("./nothing/here")


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(FileError, match="a checkpoint is a folder"):
        load(file)


def test_a_folder_with_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError) as error:
        load(tmp_path)
    said(error, "holds an adapter", "peft=")


def test_arguments_for_a_model_that_is_wrapped_already(model: Any) -> None:
    with pytest.raises(BadArgument, match="dtype would do nothing"):
        load(model, dtype=torch.float64)


@pytest.mark.parametrize("given", [{"dtype": torch.float64}, {"attn_implementation": "eager"}, {"nonsense": 1}])
def test_arguments_for_a_module_that_is_loaded_already(model: Any, given: dict[str, Any]) -> None:
    with pytest.raises(BadArgument, match=f"so {next(iter(given))} would do nothing"):
        load(model._module, tokenizer=model.tokenizer, **given)
    assert load(model._module, tokenizer=model.tokenizer, task="text-generation")._module is model._module


def test_a_revision_of_an_embedded_model() -> None:
    with pytest.raises(BadArgument, match="no revisions"):
        load("toy", revision="main")


# --------------------------------------------------------------------------------------------------------------- remote


def test_a_remote_model_is_loaded_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(engine, "wrap", lambda *args, **kwargs: given.append((args, kwargs)))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: zoo.build("gpt2").config)
    load("some/model", remote=True, revision="main")
    ((args, kwargs),) = given
    assert args == ("some/model", None)
    assert (kwargs["dispatch"], kwargs["revision"]) == (False, "main")
    assert "remote" not in kwargs


def test_a_model_that_is_only_here_does_not_run_elsewhere(checkpoint: Path, model: Any) -> None:
    for here in ("toy", checkpoint, str(checkpoint), model):
        with pytest.raises(BadArgument, match="only here"):
            load(here, remote=True)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_folder_with_two_towers_is_read_whole(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = zoo.build(family)
    module.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    model = ns.load(tmp_path)
    assert set(ns.Atlas.of(model).towers) == {"encoder", "decoder"}
    assert "not supported" not in capfd.readouterr().err
    saved = ns.capture(model, "w3 w4 w5", "encoder.layers[1].output[-1]")
    assert saved.allclose(ns.capture(zoo.wrap(family), "w3 w4 w5", "encoder.layers[1].output[-1]"))
