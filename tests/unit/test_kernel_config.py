"""Fragments: what is refused, and that a dropped option is named with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel import config
from kernel.build import ROOM, flavours
from pipeline.errors import BuildError


def _fragment(folder: Path, text: str, name: str = "10-test.config") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_values_and_places(tmp_path: Path) -> None:
    path = _fragment(
        tmp_path,
        '# a reason\nCONFIG_A=y\n\nCONFIG_B=m\nCONFIG_C="a b"\nCONFIG_D=512\nCONFIG_E=0x200000\n'
        "# CONFIG_F is not set\n",
    )
    assert [(o.name, o.value, o.place) for o in config.read([path], tmp_path)] == [
        ("CONFIG_A", "y", "10-test.config:2"),
        ("CONFIG_B", "m", "10-test.config:4"),
        ("CONFIG_C", '"a b"', "10-test.config:5"),
        ("CONFIG_D", "512", "10-test.config:6"),
        ("CONFIG_E", "0x200000", "10-test.config:7"),
        ("CONFIG_F", "n", "10-test.config:8"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG_A=yes",
        "CONFIG_A = y",
        "CONFIG_A",
        "A=y",
        "#CONFIG_A is not set",
        "# CONFIG_A=y",
        'CONFIG_A="x',
        " CONFIG_A=y",
    ],
)
def test_a_line_that_kconfig_would_pass_over_is_refused(tmp_path: Path, line: str) -> None:
    path = _fragment(tmp_path, f"CONFIG_Z=y\n{line}\n")
    with pytest.raises(BuildError) as caught:
        config.read([path], tmp_path)
    assert caught.value.details[0].startswith("10-test.config:2: neither an option nor a comment")


def test_an_option_stands_once(tmp_path: Path) -> None:
    first = _fragment(tmp_path, "CONFIG_A=y\n", "10-first.config")
    second = _fragment(tmp_path, "CONFIG_B=y\nCONFIG_A=m\n", "20-second.config")
    with pytest.raises(BuildError) as caught:
        config.read([first, second], tmp_path)
    assert caught.value.details == ("20-second.config:2: CONFIG_A stands in 10-first.config:1 already",)


def test_every_dropped_option_is_named(tmp_path: Path) -> None:
    path = _fragment(tmp_path, "CONFIG_KEPT=y\nCONFIG_DROPPED=m\nCONFIG_CHANGED=m\n# CONFIG_FORCED is not set\n")
    options = config.read([path], tmp_path)
    result = config.parse("CONFIG_KEPT=y\n# CONFIG_DROPPED is not set\nCONFIG_CHANGED=y\nCONFIG_FORCED=y\n")
    with pytest.raises(BuildError) as caught:
        config.check(options, result)
    assert caught.value.details == (
        "10-test.config:2: CONFIG_DROPPED=m was asked for, the kernel has n",
        "10-test.config:3: CONFIG_CHANGED=m was asked for, the kernel has y",
        "10-test.config:4: CONFIG_FORCED=n was asked for, the kernel has y",
    )


def test_what_was_kept_passes(tmp_path: Path) -> None:
    options = config.read([_fragment(tmp_path, "CONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\n")], tmp_path)
    config.check(options, config.parse("CONFIG_A=y\n# CONFIG_C is not set\n"))


def test_kconfig_gets_what_was_asked_for(tmp_path: Path) -> None:
    options = config.read([_fragment(tmp_path, 'CONFIG_A=y\nCONFIG_B=n\nCONFIG_C="x"\n')], tmp_path)
    assert config.text(options) == 'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x"\n'


def test_differences() -> None:
    before, after = {"CONFIG_A": "y", "CONFIG_B": "m"}, {"CONFIG_B": "y", "CONFIG_C": "m"}
    assert config.differences(before, after) == ["CONFIG_A: y -> n", "CONFIG_B: m -> y", "CONFIG_C: n -> m"]


def test_our_fragments_are_sound_and_say_why() -> None:
    paths = config.fragments(ROOM / "config.d")
    assert len(paths) >= 9
    for name in flavours():
        config.read([*paths, *config.fragments(ROOM / name / "config.d")], ROOM.parent)
    for path in paths:
        assert path.read_text(encoding="utf-8").startswith("# "), f"{path.name} does not say what it is for"


@pytest.mark.parametrize("name", ["VIRTIO_BLK", "BLK_DEV_NVME", "SATA_AHCI", "MEGARAID_SAS", "SCSI_MPT3SAS", "EXT4_FS"])
def test_what_holds_the_root_file_system_is_built_in(name: str) -> None:
    """The images have no initramfs, so a module could not be loaded from the disk that it drives."""
    options = {o.name: o.value for o in config.read(config.fragments(ROOM / "config.d"), ROOM.parent)}
    assert options[f"CONFIG_{name}"] == "y"
