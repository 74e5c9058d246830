"""Finding the Debian archive that the machine is configured for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline import apt, run
from pipeline.apt import Archive
from pipeline.errors import BuildError

LISTING = """\
Debian|http://mirror.example/debian/|bookworm|main
Debian|http://mirror.example/debian/|bookworm|contrib
Debian|http://mirror.example/debian/|bookworm|main
Debian|http://mirror.example/debian/|bookworm-updates|main
Debian|http://security.example/debian-security|bookworm-security|main
Vendor|http://vendor.example/apt|bookworm|main
|http://local.example/apt|./|
"""


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[str, ...]]]:
    """Let apt answer with a text; the commands asked are kept."""

    def set_answer(text: str) -> list[tuple[str, ...]]:
        asked: list[tuple[str, ...]] = []

        def fake(argv: list[str], **_rest: object) -> run.Result:
            asked.append(tuple(argv))
            return run.Result(tuple(argv), 0, text, "")

        monkeypatch.setattr(run, "run", fake)
        monkeypatch.setattr(run, "require", lambda name, why, package: f"/usr/bin/{name}")
        return asked

    return set_answer


def test_only_debian_is_taken_each_suite_once(answer: Callable[[str], list[tuple[str, ...]]]) -> None:
    asked = answer(LISTING)
    expected = (
        Archive("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Archive("http://mirror.example/debian", "bookworm-updates", ("main",)),
        Archive("http://security.example/debian-security", "bookworm-security", ("main",)),
    )
    assert apt.archives() == expected
    assert apt.archives() == expected
    assert len(asked) == 1  # one look a run


def test_the_main_archive_is_found_by_its_suite(answer: Callable[[str], object]) -> None:
    answer(LISTING)
    assert apt.main_archive("bookworm").components == ("main", "contrib")
    with pytest.raises(BuildError) as caught:
        apt.main_archive("trixie")
    assert caught.value.message == (
        "apt is not configured for Debian trixie, only for bookworm, bookworm-updates, bookworm-security"
    )
    assert "deb line for trixie" in caught.value.hint


@pytest.mark.parametrize("listing", ["", "Vendor|http://vendor.example/apt|bookworm|main\n"])
def test_a_machine_without_package_lists(answer: Callable[[str], object], listing: str) -> None:
    answer(listing)
    with pytest.raises(BuildError, match="no package list with Origin: Debian") as caught:
        apt.archives()
    assert caught.value.hint.startswith("apt-get update")


def test_a_line_for_sources_list() -> None:
    archive = Archive("http://mirror.example/debian", "bookworm", ("main", "contrib"))
    assert archive.line() == f"deb [signed-by={apt.KEYRING}] http://mirror.example/debian bookworm main contrib"
    assert archive.line("deb-src", "trixie").split() == [
        "deb-src",
        f"[signed-by={apt.KEYRING}]",
        "http://mirror.example/debian",
        "trixie",
        "main",
        "contrib",
    ]


def test_the_machines_proxy_is_taken_over_and_nothing_else(answer: Callable[[str], object]) -> None:
    answer(
        "APT=\nAPT::Architecture=amd64\nAcquire::http::Proxy=http://proxy.example:3142\n"
        "Acquire::https::Proxy=DIRECT\nAcquire::http::Proxy::mirror.example=DIRECT\n"
        "Acquire::http::Proxy=\nAcquire::http::ProxyAutoDetect=/bin/x\nAcquire::Retries=3\n"
    )
    assert apt.proxy_options() == [
        "Acquire::http::Proxy=http://proxy.example:3142",
        "Acquire::https::Proxy=DIRECT",
        "Acquire::http::Proxy::mirror.example=DIRECT",
    ]


@pytest.mark.runs("apt-get", "apt-config")
def test_this_machines_own_apt_answers() -> None:
    """The real commands and their real format; a machine whose lists were never fetched is told so."""
    try:
        archives = apt.archives()
    except BuildError as error:
        assert error.hint.startswith("apt-get update")
    else:
        assert all(a.site.split(":")[0] in ("http", "https", "mirror", "mirror+file", "file") for a in archives)
        assert all(a.suite and a.components for a in archives)
    for line in apt.proxy_options():
        assert line.startswith("Acquire::")
