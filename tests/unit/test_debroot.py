"""Root file systems: versions are decided once, and a root that is not what was decided is refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import apt, debroot, run
from pipeline.apt import Archive
from pipeline.debroot import Root
from pipeline.errors import BuildError
from pipeline.store import Store

RUN = run.run  # as it is without a `Machine`
VERSIONS = {"gcc": "4:12.2.0-3", "libc6": "2.36-9+deb12u9", "make": "4.3-4.1"}


class Machine:
    """What mmdebstrap and dpkg-query answer on a machine whose archive has `versions`."""

    def __init__(self, versions: dict[str, str]) -> None:
        self.versions = versions
        self.asked: list[list[str]] = []
        self.stdin = ""
        self.meanwhile: Callable[[], object] = lambda: None

    def run(self, argv: Sequence[Any], *, stdin: str = "", **_rest: Any) -> run.Result:
        words = [os.fspath(word) for word in argv]
        self.asked.append(words)
        if "--simulate" in words:
            self.meanwhile()
            self.stdin = stdin
            text = "".join(f"Inst {n} ({v} Debian:12.9/stable [amd64])\nConf {n}\n" for n, v in self.versions.items())
            return run.Result(tuple(words), 0, "", f"I: running apt\n{text}")
        if "dpkg-query" in words[0]:
            text = "".join(f"{name} {version}\n" for name, version in self.versions.items())
            return run.Result(tuple(words), 0, text, "")
        Path(words[-2]).mkdir()
        return run.Result(tuple(words), 0, "", "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(dict(VERSIONS))
    monkeypatch.setattr(run, "run", machine.run)
    monkeypatch.setattr(run, "require", lambda name, why, package: f"/usr/bin/{name}")
    monkeypatch.setattr(apt, "proxy_options", lambda: ["Acquire::http::Proxy=http://proxy.example:3142"])
    monkeypatch.setattr(
        apt,
        "archives",
        lambda: (
            Archive("http://mirror.example/debian", "bookworm", ("main",)),
            Archive("http://security.example/debian-security", "bookworm-security", ("main",)),
            Archive("http://mirror.example/debian", "trixie", ("main",)),
        ),
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return machine


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tools" / "root.yaml"
    path.parent.mkdir()
    path.write_text("packages:\n  - gcc   # compiles\n  - make  # drives\nexclude_paths: [/usr/share/man/*]\n")
    return path


def test_a_wrong_recipe_is_refused_at_once(recipe: Path, store: Store) -> None:
    recipe.write_text("packages: [gcc, gcc, 'Not A Name']\nexclude_paths: [usr/share]\npackage: x\n")
    with pytest.raises(BuildError) as caught:
        Root("root-tools", recipe, store)
    assert len(caught.value.details) == 4


def test_versions_are_decided_once(machine: Machine, recipe: Path, store: Store) -> None:
    root = Root("root-tools", recipe, store)
    assert not root.resolved
    assert root.versions == VERSIONS
    assert root.resolved
    assert not Root("root-other", recipe, store).resolved  # each decides, and is refreshed, for itself
    machine.versions["gcc"] = "4:12.2.0-4"
    again = Root("root-tools", recipe, store)
    assert again.versions == VERSIONS
    assert len(machine.asked) == 1
    key = again.stage().key
    again.refresh()
    assert again.versions["gcc"] == "4:12.2.0-4"
    assert again.stage().key != key


def test_a_decision_that_a_power_cut_emptied_is_said(machine: Machine, recipe: Path, store: Store) -> None:
    root = Root("root-tools", recipe, store)
    assert root.versions
    (file,) = (store.root / "roots").glob("root-tools-*.json")
    file.write_text("")
    with pytest.raises(BuildError, match="is damaged") as caught:
        assert Root("root-tools", recipe, store).versions
    assert caught.value.hint.startswith(f"rm {file}, ")


def test_only_this_releases_suites_are_asked(machine: Machine, recipe: Path, store: Store) -> None:
    assert Root("root-tools", recipe, store).versions
    lines = machine.stdin.splitlines()
    assert [line.split()[3] for line in lines] == ["bookworm", "bookworm-security"]
    assert all(f"[signed-by={apt.KEYRING}]" in line for line in lines)


def test_the_command_for_mmdebstrap(machine: Machine, recipe: Path, store: Store) -> None:
    assert Root("root-tools", recipe, store).versions
    (argv,) = machine.asked
    assert "--include=gcc,make" in argv
    assert "--variant=minbase" in argv
    assert "--dpkgopt=path-exclude=/usr/share/man/*" in argv
    assert '--aptopt=Acquire::http::Proxy "http://proxy.example:3142"' in argv
    assert "--aptopt=APT::Install-Recommends false" in argv


@pytest.mark.runs("sh")
def test_the_machines_addresses_are_not_left_in_the_tree(
    machine: Machine, recipe: Path, store: Store, tmp_path: Path
) -> None:
    """Of the tree alone, wherever it is."""
    assert Root("root-tools", recipe, store).versions
    tree, other = tmp_path / "a tree", tmp_path / "a"
    other.write_text("somebody's")
    for name in ("apt/apt.conf.d", "dpkg/dpkg.cfg.d"):
        (tree / "etc" / name).mkdir(parents=True)
        (tree / "etc" / name / "99mmdebstrap").write_text("Proxy")
    (tree / "etc/apt/sources.list").write_text("deb")
    for word in machine.asked[0]:
        if word.startswith("--customize-hook="):
            RUN(["sh", "-c", word.partition("=")[2], "exec", tree], cwd=tmp_path)
    assert [str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()] == ["etc/apt/sources.list"]
    assert (tree / "etc/apt/sources.list").read_text() == "" and other.read_text() == "somebody's"


def test_a_package_that_apt_does_not_know(machine: Machine, recipe: Path, store: Store) -> None:
    del machine.versions["make"]
    root = Root("root-tools", recipe, store)
    with pytest.raises(BuildError, match="apt did not choose make"):
        _ = root.versions
    assert not root.resolved


def test_the_key_follows_recipe_and_versions(machine: Machine, recipe: Path, store: Store) -> None:
    first = Root("root-tools", recipe, store).stage()
    assert Root("root-tools", recipe, store).stage().key == first.key
    assert Root("root-kernel", recipe, store).stage().key != first.key
    recipe.write_text(recipe.read_text() + "include_paths: [/usr/share/man/man8/*]\n")
    assert Root("root-tools", recipe, store).stage().key != first.key


def test_a_comment_in_the_recipe_changes_nothing(machine: Machine, recipe: Path, store: Store) -> None:
    first = Root("root-tools", recipe, store).stage()
    recipe.write_text("# why\n" + recipe.read_text())
    assert Root("root-tools", recipe, store).stage().key == first.key
    assert len(machine.asked) == 1


def test_offline_asks_nobody(machine: Machine, recipe: Path, store: Store) -> None:
    root = Root("root-tools", recipe, store, offline=True)
    with pytest.raises(BuildError, match="never resolved and --offline is given") as caught:
        _ = root.versions
    assert "invoke fetch" in caught.value.hint
    assert machine.asked == []
    assert Root("root-tools", recipe, store).versions == VERSIONS
    with pytest.raises(BuildError, match="not in the store and --offline is given"):
        debroot.tree(store, Root("root-tools", recipe, store, offline=True))
    assert len(machine.asked) == 1
    path = debroot.tree(store, Root("root-tools", recipe, store))
    assert debroot.tree(store, Root("root-tools", recipe, store, offline=True)) == path


def test_the_tree_and_its_packages_are_the_result(machine: Machine, recipe: Path, store: Store) -> None:
    path = debroot.tree(store, Root("root-tools", recipe, store))
    assert path.name == "root"
    assert (path / "build").is_dir()  # where the sandbox mounts the work
    assert json.loads((path.parent / "packages.json").read_text()) == VERSIONS


def test_mmdebstrap_takes_its_whole_family_along(machine: Machine, recipe: Path, store: Store) -> None:
    """Seen with `kill -9`: apt and dpkg went on unpacking into the place where the next run builds."""
    debroot.tree(store, Root("root-tools", recipe, store))
    (argv,) = (argv for argv in machine.asked if "--simulate" not in argv and "--variant=minbase" in argv)
    assert Path(argv[0]).name == "unshare"
    assert {"--pid", "--fork", "--kill-child"} <= set(argv[: argv.index("--")])
    assert Path(argv[argv.index("--") + 1]).name == "mmdebstrap"


@pytest.mark.runs("unshare")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a process namespace without a user namespace")
def test_that_a_namespace_ends_whole(tmp_path: Path, wait_until: Callable[..., float]) -> None:
    """The options that `_build` relies on, with a grandchild that listens to nobody."""
    beat = tmp_path / "beat"
    deaf = f"trap '' TERM HUP; while :; do date +%N >{beat}; sleep 0.05; done"
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "sh", "-c", f"({deaf}) & wait"]
    with run.start(argv, log=tmp_path / "log") as process:
        wait_until(lambda: beat.exists() and beat.read_text() != "", "the first beat")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    looks = []

    def silent() -> bool:
        looks.append(beat.read_text())
        return len(looks) > 4 and len(set(looks[-4:])) == 1

    wait_until(silent, "the end of the beats", 10)


def test_an_archive_that_moved_meanwhile_is_noticed(machine: Machine, recipe: Path, store: Store) -> None:
    root = Root("root-tools", recipe, store)
    stage = root.stage()
    machine.versions["libc6"] = "2.36-9+deb12u10"
    with pytest.raises(BuildError, match=r"the archive moved while the root was made: libc6") as caught:
        store.ensure(stage)
    assert caught.value.hint.startswith("invoke refresh-roots")
    assert not store.has(stage)


def test_only_root_makes_roots(machine: Machine, recipe: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Root("root-tools", recipe, store).stage()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuildError, match="root is needed to make root-tools") as caught:
        store.ensure(stage)
    assert caught.value.hint.startswith("sudo ")


def test_two_builds_at_once_decide_once(machine: Machine, recipe: Path, store: Store) -> None:
    """While one asks the archive, another process must wait for its answer, or the two build different roots."""
    seen = []

    def another_process() -> None:
        for file in (store.root / "locks").glob("*"):
            with file.open("a") as stream:  # a description of its own, as another process has
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    seen.append(file.name)

    machine.meanwhile = another_process
    assert Root("root-tools", recipe, store).versions == VERSIONS
    assert len(seen) == 1
    assert "root-tools" in seen[0]


def test_the_one_who_waited_takes_the_others_answer(machine: Machine, recipe: Path, store: Store) -> None:
    root, other = Root("root-tools", recipe, store), Root("root-tools", recipe, store)
    lock = store.lock

    def lock_after_another(name: str, *, wait: bool = True) -> Any:
        store.lock = lock  # type: ignore[method-assign]
        assert other.versions == VERSIONS
        machine.versions["gcc"] = "newer"
        return lock(name, wait=wait)

    store.lock = lock_after_another  # type: ignore[method-assign]
    assert root.versions == VERSIONS


def test_versions_of_several_roots(machine: Machine, recipe: Path, store: Store) -> None:
    assert debroot.all_versions([Root("root-tools", recipe, store)]) == {"root-tools": VERSIONS}


def test_resolving_takes_root(recipe: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the archive is to blame: mmdebstrap refuses, whatever it is asked."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuildError, match="root is needed to resolve the packages of root-tools"):
        _ = Root("root-tools", recipe, store).versions
