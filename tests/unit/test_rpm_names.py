"""What a package's file name says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BuildError
from pipeline.rpm import FileName


def test_a_package_name_taken_apart() -> None:
    parsed = FileName.parse("kernel-lvs-devel-6.12.9-3.0a1b2c3d.x86_64.rpm")
    assert parsed == FileName("kernel-lvs-devel", "6.12.9", 3, "0a1b2c3d", "x86_64")
    assert parsed.line == ("kernel-lvs-devel", "6.12.9", 3, "x86_64")


def test_a_distribution_tag_is_not_part_of_the_key() -> None:
    assert FileName.parse("ipvsadm-1.31-1.0a1b2c3d.el9.x86_64.rpm") == FileName(
        "ipvsadm", "1.31", 1, "0a1b2c3d", "x86_64"
    )


def test_builds_of_one_release_share_their_line() -> None:
    one, two = (FileName.parse(f"frr-8.4.4-1.{key}.src.rpm") for key in ("0a1b2c3d", "ffffffff"))
    assert one.line == two.line
    for other in (
        "frr-8.4.4-2.0a1b2c3d.src.rpm",
        "frr-8.4.4-1.0a1b2c3d.x86_64.rpm",
        "frr-8.4.5-1.0a1b2c3d.src.rpm",
        "frr2-8.4.4-1.0a1b2c3d.src.rpm",
    ):
        assert FileName.parse(other).line != one.line


@given(
    st.from_regex(r"[a-z][a-z0-9+]*(-[a-z0-9_+]+)*", fullmatch=True),
    st.from_regex(r"[0-9]+(\.[0-9]+){0,3}(~rc[0-9])?", fullmatch=True),
    st.integers(min_value=0, max_value=9999),
    st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
    st.sampled_from(["x86_64", "noarch", "src"]),
)
def test_every_name_of_ours_is_read_back(name: str, version: str, number: int, key8: str, arch: str) -> None:
    file = f"{name}-{version}-{number}.{key8}.{arch}.rpm"
    assert FileName.parse(file) == FileName(name, version, number, key8, arch)


@pytest.mark.parametrize(
    "file",
    [
        "keepalived-2.3.4-1.x86_64.rpm",  # no key
        "keepalived-2.3.4-0a1b2c3d.x86_64.rpm",  # no number
        "keepalived-2.3.4-1.0a1b2c3.x86_64.rpm",  # seven digits
        "keepalived-2.3.4-1.0A1B2C3D.x86_64.rpm",
        "keepalived-2.3.4.0a1b2c3d.x86_64.rpm",  # no release
        "keepalived-2.3.4-r1.0a1b2c3d.x86_64.rpm",
        "keepalived-2.3.4-1.0a1b2c3d.x86_64.rpm.part",
        "repomd.xml",
        "",
    ],
)
def test_other_names_are_refused_with_a_next_step(file: str) -> None:
    with pytest.raises(BuildError, match="not a package name of the form") as caught:
        FileName.parse(file)
    assert caught.value.message.startswith(f"{file}: ")
    assert "remove it" in caught.value.hint
