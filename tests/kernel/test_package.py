"""The kernel packages: what they hold, what they ask for, and what their scriptlets do on different systems."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernel import build
from pipeline import rpm
from pipeline.sandbox import Overlay, Sandbox
from pipeline.store import Store

pytestmark = pytest.mark.build


@dataclass(frozen=True)
class Built:
    """A flavour's packages and the root to look at them in."""

    name: str
    uname: str
    folder: Path
    root: Path

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.root)

    @property
    def main(self) -> Path:
        return build.image(self.folder, self.name)

    @property
    def devel(self) -> Path:
        (found,) = self.folder.glob(f"kernel-{self.name}-devel-*.rpm")
        return found

    @property
    def source(self) -> Path:
        (found,) = self.folder.glob("*.src.rpm")
        return found

    def lines(self, package: Path, what: str) -> list[str]:
        return rpm.query(self.sandbox, package, f"[%{{{what}}}\n]").split("\n")[:-1]


@pytest.fixture(scope="module", params=build.flavours())
def built(request: pytest.FixtureRequest) -> Built:
    store = Store()
    room = build.kernels(store)
    folder = store.ensure(room.stage(request.param))
    return Built(request.param, room.uname(request.param), folder, store.path(room.root.stage()) / "root")


def test_files(built: Built) -> None:
    files = set(built.lines(built.main, "FILENAMES"))
    for name in ("vmlinuz", "System.map", "config"):
        assert f"/boot/{name}-{built.uname}" in files
    modules = f"/lib/modules/{built.uname}"
    # depmod ran at build time: the kernel can load modules without a scriptlet having run
    for name in ("modules.dep.bin", "modules.alias.bin", "kernel/net/netfilter/ipvs/ip_vs.ko"):
        assert f"{modules}/{name}" in files
    stray = [f for f in files if not f.startswith(("/boot", modules, f"/usr/share/licenses/kernel-{built.name}"))]
    assert stray == []


def test_provides(built: Built) -> None:
    form = "[%{PROVIDENAME} %{PROVIDEFLAGS:depflags} %{PROVIDEVERSION}\n]"
    provides = {" ".join(line.split()) for line in rpm.query(built.sandbox, built.main, form).splitlines()}
    version = built.uname.removesuffix(f".{built.name}")
    assert {f"kernel = {version}", f"kernel-uname-r = {built.uname}", "installonlypkg(kernel)"} <= provides


def test_requires_nothing_that_enterprise_linux_lacks(built: Built) -> None:
    for package in (built.main, built.devel):
        requires = {r for r in built.lines(package, "REQUIRENAME") if not r.startswith("rpmlib(")}
        assert requires <= {"/bin/sh"}, package.name


def test_the_build_programs_run_on_enterprise_linux(built: Built, tmp_path: Path) -> None:
    """modpost, objtool and their like are compiled here, and used where the package is installed: glibc 2.34 there."""
    script = (
        "rpm2cpio /build/devel.rpm >/build/out/cpio; cd /build/out; cpio -idm --quiet <cpio\n"
        "find . -type f -perm /111 -exec sh -c 'objdump -T \"$1\" 2>/dev/null' - {} \\;"
    )
    symbols = built.sandbox.run(
        ["sh", "-ec", script], binds={tmp_path: "/build/out"}, ro_binds={built.devel: "/build/devel.rpm"}
    ).stdout
    versions = {tuple(int(n) for n in v.split(".")) for v in re.findall(r"GLIBC_([\d.]+)", symbols)}
    assert versions, "no program was found: has the path changed?"
    assert max(versions) <= (2, 34)


def test_source_package_is_complete(built: Built) -> None:
    files = set(built.lines(built.source, "FILENAMES"))
    wanted = {f"kernel-{built.name}.spec", f"kernel-{built.name}.config", *build.flavour(built.name).series.names}
    assert wanted <= files
    assert [f for f in files if ".tar." in f]


def test_no_trace_of_the_builder(built: Built) -> None:
    for package in (built.main, built.devel, built.source):
        assert built.lines(package, "BUILDHOST") == ["builder"]
        assert built.lines(package, "BUILDTIME") == ["1735689600"]


# --- scriptlets


_RECORD = '#!/bin/sh\necho "${0##*/} $*" >>/build/out/calls\n'


def _scriptlet(built: Built, what: str, folder: Path, files: dict[str, str]) -> list[str]:
    """Run a scriptlet in the root with more files below /etc and /usr/lib; returns the calls that those recorded."""
    text = rpm.query(built.sandbox, built.main, f"%{{{what}}}")
    out = folder / "out"
    out.mkdir(parents=True)
    overlays = []
    for number, top in enumerate(("etc", "usr/lib")):
        upper = folder / f"upper{number}"
        for name, content in files.items():
            if name.startswith(f"{top}/"):
                path = upper / Path(name).relative_to(top)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
                path.chmod(0o755)
        overlays.append(Overlay(built.root / top, upper, folder / f"work{number}", f"/{top}"))
    built.sandbox.run(["sh", "-ec", text], binds={out: "/build/out"}, overlays=overlays, what=f"%{what.lower()}")
    calls = out / "calls"
    return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


SCRIPTLETS = ("POSTTRANS", "PREUN", "POSTUN")


@pytest.mark.parametrize("what", SCRIPTLETS)
def test_scriptlets_do_nothing_where_nothing_is_to_be_done(built: Built, what: str, tmp_path: Path) -> None:
    assert _scriptlet(built, what, tmp_path, {}) == []


def test_debian_hooks_are_called_as_debian_calls_them(built: Built, tmp_path: Path) -> None:
    hooks = {"etc/kernel/postinst.d/zz-update-grub": _RECORD, "etc/kernel/postrm.d/zz-update-grub": _RECORD}
    call = [f"zz-update-grub {built.uname} /boot/vmlinuz-{built.uname}"]
    assert _scriptlet(built, "POSTTRANS", tmp_path / "1", hooks) == call
    assert _scriptlet(built, "PREUN", tmp_path / "2", hooks) == []
    assert _scriptlet(built, "POSTUN", tmp_path / "3", hooks) == call


@pytest.mark.parametrize("what", SCRIPTLETS)
def test_a_failing_hook_does_not_break_the_transaction(built: Built, what: str, tmp_path: Path) -> None:
    failing = "#!/bin/sh\nexit 3\n"
    hooks = {"etc/kernel/postinst.d/broken": failing, "etc/kernel/postrm.d/broken": failing}
    assert _scriptlet(built, what, tmp_path, hooks) == []


def test_enterprise_linux_gets_kernel_install_and_no_hooks(built: Built, tmp_path: Path) -> None:
    """The root has no /bin/kernel-install, so what is seen is that its failure is survived and no hook is called."""
    files = {
        "usr/lib/kernel/install.d/20-grub.install": _RECORD,
        "etc/kernel/postinst.d/dkms": _RECORD,
        "etc/kernel/postrm.d/dkms": _RECORD,
    }
    for number, what in enumerate(SCRIPTLETS):
        assert _scriptlet(built, what, tmp_path / str(number), files) == []
    text = rpm.query(built.sandbox, built.main, "%{POSTTRANS}")
    assert f"/bin/kernel-install add {built.uname} /boot/vmlinuz-{built.uname}" in text
