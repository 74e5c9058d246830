"""Which key signs: the user's own by a variable, else one that is made on first use."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import run, signing
from pipeline.errors import BuildError
from pipeline.sandbox import Sandbox
from pipeline.signing import PASSPHRASE, VARIABLE, SigningKey
from tests.conftest import Recorder

SECRET = "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\n\nabc\n"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.asc"
    file.write_text(SECRET)
    return file


def test_without_a_variable_it_is_the_generated_one() -> None:
    key = SigningKey.find()
    assert key.file == Path(os.environ["XDG_DATA_HOME"]) / "lvsforge" / "signing-key.asc"
    assert not key.exists
    with pytest.raises(BuildError, match="does not exist") as caught:
        _ = key.digest
    assert caught.value.hint == "invoke signing-key"


def test_the_generated_key_is_not_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """`invoke clean --store` must not take it away."""
    monkeypatch.delenv("XDG_DATA_HOME")
    assert signing.default_file() == Path.home() / ".local/share/lvsforge/signing-key.asc"


def test_a_key_that_is_named_from_here(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    """A sandbox binds it by its path, from wherever that runs."""
    monkeypatch.chdir(secret.parent)
    monkeypatch.setenv(VARIABLE, secret.name)
    assert SigningKey.find().file == secret


def test_the_named_key(monkeypatch: pytest.MonkeyPatch, secret: Path, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(secret))
    key = SigningKey.find()
    assert (key.file, key.passphrase) == (secret, None)
    with key.lent() as binds:
        assert list(binds) == [secret]
    phrase = tmp_path / "phrase"
    phrase.write_text("words\n")
    monkeypatch.setenv(PASSPHRASE, str(phrase))
    key = SigningKey.find()
    with key.lent() as binds:
        assert list(binds) == [secret, phrase]
    assert "passphrase-file" in key.import_script
    assert "words" not in key.import_script


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("-----BEGIN PGP PUBLIC KEY BLOCK-----\n", "is not an armoured secret key"),
        ("", "is not an armoured secret key"),
    ],
)
def test_a_named_key_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "key.asc"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(BuildError, match=said) as caught:
        SigningKey.find()
    assert caught.value.message.startswith(f"{VARIABLE}: {file}")
    assert f"> {file}" in caught.value.hint


def test_a_passphrase_file_that_is_missing(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(secret))
    monkeypatch.setenv(PASSPHRASE, "/nowhere/phrase")
    with pytest.raises(BuildError, match="/nowhere/phrase does not exist"):
        SigningKey.find()


def test_two_keys_differ_to_the_store(secret: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.asc"
    other.write_text(SECRET + "x")
    assert SigningKey(secret).digest != SigningKey(other).digest


class FakeSandbox:
    """gpg that answers with a text."""

    def __init__(self, text: str = SECRET) -> None:
        self.text = text
        self.commands: list[Sequence[str]] = []

    def run(self, command: Sequence[str], **_rest: Any) -> run.Result:
        self.commands.append(command)
        return run.Result(tuple(command), 0, self.text, "")


def test_a_key_is_made_once_for_its_owner_only(events: Recorder) -> None:
    sandbox = FakeSandbox()
    os.umask(0o022)
    key = SigningKey.find()
    key.make(cast(Sandbox, sandbox))
    assert key.file.read_text() == SECRET
    assert stat.S_IMODE(key.file.stat().st_mode) == 0o600
    assert [p.name for p in key.file.parent.iterdir()] == ["signing-key.asc"]
    assert any(str(key.file) in text and VARIABLE in text for text in events.texts("warn"))
    key.make(cast(Sandbox, sandbox))
    assert len(sandbox.commands) == 1


def test_of_two_that_make_a_key_the_first_ones_stays() -> None:
    """The other has signed nothing by its own yet."""
    key = SigningKey.find()

    class Slow(FakeSandbox):
        def run(self, command: Sequence[str], **rest: Any) -> run.Result:
            key.file.write_text("the other's")
            return super().run(command, **rest)

    key.make(cast(Sandbox, Slow()))
    assert key.file.read_text() == "the other's"
    assert [p.name for p in key.file.parent.iterdir()] == ["signing-key.asc"]


def test_a_key_is_not_made_from_a_failure() -> None:
    class Broken(FakeSandbox):
        def run(self, command: Sequence[str], **_rest: Any) -> run.Result:
            raise BuildError("gpg failed", "read the log")

    key = SigningKey.find()
    with pytest.raises(BuildError, match="gpg failed"):
        key.make(cast(Sandbox, Broken()))
    assert not key.exists
    with pytest.raises(BuildError, match="gpg exported no secret key"):
        key.make(cast(Sandbox, FakeSandbox("")))
    assert not key.exists
