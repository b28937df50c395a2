"""The ranges in pyproject.toml can be tried at both ends."""

from __future__ import annotations

import pytest

import versions


def test_every_dependency_has_a_lowest_version_and_torch_stays() -> None:
    lowest = versions.constraints("lowest")
    assert {line.split("==")[0] for line in lowest} == {versions.name_of(line) for line in versions.REQUIREMENTS}
    assert versions.constraints("newest") == [versions.pin()]
    assert versions.pin() in lowest


@pytest.mark.parametrize(
    ("requirement", "lowest"), [("lark>=1.3", "lark==1.3"), ("nnsight>=0.8.1,<0.9", "nnsight==0.8.1")]
)
def test_the_lowest_is_read_off_the_range(requirement: str, lowest: str) -> None:
    assert versions.lowest_of(requirement) == lowest


@pytest.mark.parametrize("requirement", ["lark", "lark<2"])
def test_a_range_without_a_lower_end_says_what_to_write(requirement: str) -> None:
    with pytest.raises(SystemExit, match=r"no lowest version to test; write 'lark>=\.\.\.'"):
        versions.lowest_of(requirement)
