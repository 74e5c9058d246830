"""The key that signs packages and repository metadata: the user's own, or one made on first use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pipeline import progress, settings, store
from pipeline.errors import BuildError
from pipeline.sandbox import Sandbox

VARIABLE = "LVSFORGE_SIGNING_KEY"
PASSPHRASE = "LVSFORGE_SIGNING_PASSPHRASE_FILE"  # noqa: S105  a variable's name
_ARMOUR = "BEGIN PGP PRIVATE KEY BLOCK"
_INSIDE = "/build/signing-key.asc"
_INSIDE_PASSPHRASE = "/build/signing-passphrase"  # noqa: S105  a path


def default_file() -> Path:
    """Where the generated key is kept: it is no cache, so it is not in the store."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "lvsforge" / "signing-key.asc"


class SigningKey:
    """An exported OpenPGP secret key in a file."""

    def __init__(self, file: Path, passphrase: Path | None = None) -> None:
        self.file = file
        self.passphrase = passphrase

    @classmethod
    def find(cls) -> SigningKey:
        """The key that `LVSFORGE_SIGNING_KEY` names, else the generated one (which may not exist yet).

        Raises:
            BuildError: a variable names a file that is not there or is no secret key.
        """
        phrase = settings.named(PASSPHRASE)
        if phrase and not phrase.is_file():
            raise BuildError(f"{PASSPHRASE}: {phrase} does not exist", f"unset {PASSPHRASE}, or correct it")
        file = settings.named(VARIABLE)
        if not file:
            return cls(default_file())
        if not file.is_file():
            raise BuildError(
                f"{VARIABLE}: {file} does not exist",
                f"gpg --armor --export-secret-keys KEY > {file}   (or unset {VARIABLE})",
            )
        if _ARMOUR not in file.read_text(encoding="utf-8", errors="replace"):
            raise BuildError(
                f"{VARIABLE}: {file} is not an armoured secret key",
                f"gpg --armor --export-secret-keys KEY > {file}",
            )
        return cls(file, phrase)

    @property
    def exists(self) -> bool:
        """Whether the file is there."""
        return self.file.is_file()

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file: what makes two keys different to the store.

        Raises:
            BuildError: the key was never made.
        """
        if not self.exists:
            raise BuildError(f"{self.file} does not exist", "invoke signing-key")
        return store.digest(self.file)

    @property
    def import_script(self) -> str:
        """Shell lines that load the key inside a sandbox and set KEYID; the agent dies with the sandbox."""
        loopback = ""
        if self.passphrase:
            options = f"pinentry-mode loopback\\npassphrase-file {_INSIDE_PASSPHRASE}\\n"
            loopback = f"printf '{options}' >$GNUPGHOME/gpg.conf\n"
        return (
            "export GNUPGHOME=/tmp/gnupg; mkdir -m 700 $GNUPGHOME\n"
            f"{loopback}gpg --batch --quiet --import {_INSIDE}\n"
            "KEYID=$(gpg --batch --with-colons --list-secret-keys | awk -F: '$1 == \"fpr\" { print $10; exit }')"
        )

    @contextlib.contextmanager
    def lent(self) -> Iterator[dict[Path, str]]:
        """The read-only binds under which `import_script` finds the key."""
        binds = {self.file: _INSIDE}
        if self.passphrase:
            binds[self.passphrase] = _INSIDE_PASSPHRASE
        yield binds

    def make(self, sandbox: Sandbox) -> None:
        """Generate the key, if it is not there: RSA 4096, which every rpm in service can verify; no expiry."""
        if self.exists:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        script = (
            "set -eu; export GNUPGHOME=/tmp/gnupg; mkdir -m 700 $GNUPGHOME\n"
            "gpg --batch --quiet --passphrase '' --quick-generate-key 'lvsforge packages' rsa4096 sign never\n"
            "gpg --batch --armor --export-secret-keys"
        )
        with progress.step(f"generating the signing key {self.file}"):
            # the key must not be dated before the machine's clock says it was made
            text = sandbox.run(["sh", "-c", script], what="generating the signing key").stdout
            if _ARMOUR not in text:
                raise BuildError("gpg exported no secret key", "the same command with --debug shows gpg's command")
            beside = self.file.with_suffix(f".{os.getpid()}")
            beside.touch(mode=0o600)
            with beside.open("w", encoding="ascii") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())  # a power cut must leave no empty key, which would count as one
            with contextlib.suppress(FileExistsError):  # another run was faster: by its key packages are signed
                os.link(beside, self.file)
            beside.unlink()
        progress.warn(f"packages are signed with a generated key; keep {self.file} safe, or set {VARIABLE}")

    def public(self, sandbox: Sandbox) -> str:
        """The armoured public key."""
        script = f'set -eu\n{self.import_script}\ngpg --batch --armor --export "$KEYID"'
        with self.lent() as secret:
            return sandbox.run(["sh", "-c", script], ro_binds=secret, what="exporting the public key").stdout
