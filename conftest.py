"""What holds for every test: in tests/, in the README's code and in the docstrings of src/.

The environment is set before anything imports torch or transformers, and processes that tests start inherit it.
"""

from __future__ import annotations

import os
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

# No test needs the network: models are tiny and made in memory.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny matrices gain nothing from threads, and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# No window, also in examples.
os.environ["MPLBACKEND"] = "Agg"

# Before nnsight, which gives every object a `.save`: beartype's import would stumble over that.
import beartype  # noqa: F401
import pytest
from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# --- hypothesis ------------------------------------------------------------------------------------------------------

# A forward pass takes what it takes, so time is no property to test.
settings.register_profile("here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
# The same examples in every run, so that a red build is about the change it ran on.
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# --- every test ------------------------------------------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What examples, notebooks and the README's code put into a temporary folder goes where pytest clears up."""
    folder = str(tmp_path_factory.mktemp("temporary"))
    tempfile.tempdir = os.environ["TMPDIR"] = folder


@pytest.fixture(scope="session")
def model():
    """A tiny random GPT-2, wrapped for nnsight. Shared: whoever changes it puts it back."""
    from zoo import wrap

    return wrap("gpt2")


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of English words, for the examples of tasks."""
    from english import english

    return english(digits=True)


# --- documentation that runs -----------------------------------------------------------------------------------------


def docstring_names(namespace: dict) -> None:
    """What an example in a docstring may use without saying so; `model` and `tokenizer` are there too."""
    import torch

    import nnsplice as ns

    namespace.update(ns=ns, torch=torch)


pages = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/*.md", "docs/*/*.md"])
docstrings = Sybil(
    parsers=[DocTestParser(optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=["src/*/*.py", "src/*/*/*.py", "src/*/*/*/*.py"],
    document_types={".py": PythonDocStringDocument},
    setup=docstring_names,
    fixtures=["model", "tokenizer"],
)
pytest_collect_file = (pages + docstrings).pytest()
