"""The Debian archive that this machine is configured for: where it is and what signs it.

No host is named in this repository. Sources and build roots come from whatever archive the machine's own
apt uses, restricted to entries whose signed Release file says `Origin: Debian`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from pipeline import run
from pipeline.errors import BuildError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Archive:
    """One suite of the archive as apt sees it.

    Attributes:
        site: the base address, without a trailing slash.
        suite: `bookworm`, `bookworm-security`, …
        components: `main`, …
    """

    site: str
    suite: str
    components: tuple[str, ...]

    def line(self, kind: str = "deb", suite: str | None = None) -> str:
        """A sources.list line for this archive (or for another suite on the same site)."""
        return f"{kind} [signed-by={KEYRING}] {self.site} {suite or self.suite} {' '.join(self.components)}"


@cache
def archives() -> tuple[Archive, ...]:
    """The Debian suites that the machine's apt is configured for.

    Raises:
        BuildError: apt has no package lists yet, or no Debian archive among its sources.
    """
    run.require("apt-get", "to find the Debian archive", "apt")
    form = "$(ORIGIN)|$(SITE)|$(RELEASE)|$(COMPONENT)"
    listing = run.run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).stdout
    found: dict[tuple[str, str], list[str]] = {}
    for line in listing.splitlines():
        origin, site, suite, component = line.split("|")
        if origin == "Debian":
            found.setdefault((site.rstrip("/"), suite), []).append(component)
    if not found:
        raise BuildError(
            "apt knows no Debian archive: no package list with Origin: Debian",
            "apt-get update   (and look at /etc/apt/sources.list*)",
        )
    return tuple(Archive(site, suite, tuple(dict.fromkeys(parts))) for (site, suite), parts in found.items())


def main_archive(codename: str) -> Archive:
    """The archive's entry for a release itself (`bookworm`).

    Raises:
        BuildError: the machine is configured for another release.
    """
    for archive in archives():
        if archive.suite == codename:
            return archive
    raise BuildError(
        f"apt is not configured for Debian {codename}, only for {', '.join(a.suite for a in archives())}",
        f"add a deb line for {codename} to /etc/apt/sources.list.d, then: apt-get update",
    )


def proxy_options() -> list[str]:
    """The machine's own apt proxy settings, as `-o` style options for a private apt configuration."""
    dump = run.run(["apt-config", "dump", "--format", "%f=%v%n"]).stdout
    return [line for line in dump.splitlines() if re.match(r"Acquire::https?::Proxy\b.*=.+", line)]
