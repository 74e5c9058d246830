"""The artefact store: the right key, whole results only, one builder at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import run
from pipeline import store as store_module
from pipeline.errors import BuildError
from pipeline.store import Stage, Store, remove_tree, tree_digest
from tests.conftest import Recorder

Wait = Callable[..., float]
TOP = Path(__file__).parents[2]


def nothing(out: Path) -> None:
    """A build that makes one file."""
    (out / "made").write_text("content")


def stage(name: str = "toy", build: Callable[[Path], None] = nothing, needs: Any = (), **inputs: Any) -> Stage:
    return Stage(name, inputs, build, needs)


def leftovers(store: Store) -> list[Path]:
    """What is in the store beside locks and results."""
    return sorted(p for p in (store.root / "tmp").glob("*"))


# --- where it is


def test_location_by_variable_then_cache_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVSFORGE_STORE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert store_module.location() == Path("/a")
    monkeypatch.setenv("LVSFORGE_STORE", "b")
    assert store_module.location() == Path.cwd() / "b"
    monkeypatch.setenv("LVSFORGE_STORE", "~/d")
    assert store_module.location() == Path("/c/d")
    monkeypatch.delenv("LVSFORGE_STORE")
    assert store_module.location() == Path("/b/lvsforge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store_module.location() == Path("/c/.cache/lvsforge")


@pytest.mark.parametrize("name", ["big disk", "a,b", "a:b", "it's"])
def test_a_path_that_tools_would_split_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BuildError, match="path must not have") as caught:
        Store(tmp_path / name)
    assert "LVSFORGE_STORE" in caught.value.hint


# --- the key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(a=st.dictionaries(st.text(), JSON, max_size=4), b=st.dictionaries(st.text(), JSON, max_size=4))
def test_keys_differ_when_inputs_differ(a: dict[str, Any], b: dict[str, Any]) -> None:
    assume("needs" not in a and "needs" not in b)  # the store's own
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (Stage("x", a, nothing).key == Stage("x", b, nothing).key) is same


def test_the_key_does_not_depend_on_the_order_of_inputs() -> None:
    assert stage(a=1, b={"c": 2, "d": 3}).key == Stage("toy", {"b": {"d": 3, "c": 2}, "a": 1}, nothing).key


def test_the_key_depends_on_name_inputs_and_needs() -> None:
    base = stage("base", version="6.12.9")
    other = stage("base", version="6.12.10")
    keys = [
        stage(a=1),
        stage("other", a=1),
        stage(a=2),
        stage(a="1"),
        stage(a=1, b=None),
        stage(a=1, needs=[base]),
        stage(a=1, needs=[other]),
        stage(a=1, needs=[base, stage("second")]),
    ]
    assert len({each.key for each in keys}) == len(keys)
    assert all(len(each.key) == store_module.KEY_LENGTH for each in keys)


def test_the_key_follows_the_needs_of_the_needs() -> None:
    def top(version: str) -> str:
        return stage("top", needs=[stage("middle", needs=[stage("base", version=version)])]).key

    assert top("1") != top("2")
    assert top("1") == top("1")


def test_the_key_is_the_same_on_every_machine() -> None:
    """A shared store serves all of them: neither hash randomisation nor the platform may enter."""
    assert Stage("toy", {"a": [1, "ä"]}, nothing).key == "835c64ef5d87af37"


# --- building once


def test_a_result_is_built_once_and_then_reused(store: Store, events: Recorder) -> None:
    built: list[Path] = []

    def build(out: Path) -> None:
        built.append(out)
        nothing(out)

    first = store.ensure(stage(build=build, a=1))
    assert first == store.root / "toy" / stage(a=1).key
    assert (first / "made").read_text() == "content"
    assert built[0] != first  # beside, not in place
    assert store.ensure(stage(build=build, a=1)) == first
    assert len(built) == 1
    assert events.texts("reused") == [f"toy: same inputs ({stage(a=1).key})"]
    store.ensure(stage(build=build, a=2))
    assert len(built) == 2
    assert leftovers(store) == []


def test_the_record_says_what_the_result_was_made_of(store: Store) -> None:
    base = stage("base")
    path = store.ensure(stage(needs=[base], version="2.3.4"))
    record = json.loads((path / "inputs.json").read_text())
    assert record["inputs"] == {"version": "2.3.4", "needs": {"base": base.key}}
    assert record["key"] == path.name
    assert record["files"]["made"][0] == len("content")


def test_needs_are_built_first_and_only_when_needed(store: Store) -> None:
    order: list[str] = []

    def builder(name: str) -> Callable[[Path], None]:
        return lambda out: order.append(name)

    base = stage("base", builder("base"))
    top = stage("top", builder("top"), [base])
    store.ensure(top)
    assert order == ["base", "top"]
    remove_tree(store.path(base))
    store.ensure(top)
    assert order == ["base", "top"]  # the finished top does not need its base any more


def test_a_need_that_is_pruned_while_the_others_are_built_is_built_again(store: Store) -> None:
    first = stage("first")

    def prunes(_: Path) -> None:
        remove_tree(store.path(first))

    def uses(out: Path) -> None:
        (out / "made").write_bytes((store.path(first) / "made").read_bytes())

    store.ensure(stage("top", uses, [first, stage("second", prunes)]))


def test_the_step_says_why_it_is_taken(store: Store, events: Recorder) -> None:
    store.ensure(stage(version="1"))
    store.ensure(stage(version="2"))
    assert events.texts("begin") == ["toy   [never built]", "toy   [changed: version]"]


# --- whole or not at all


@pytest.mark.parametrize(
    "error", [BuildError("it broke", "mend it"), ValueError("a bug"), KeyboardInterrupt()], ids=repr
)
def test_a_build_that_raises_leaves_nothing(store: Store, error: BaseException) -> None:
    def broken(out: Path) -> None:
        (out / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.ensure(stage(build=broken))
    assert not store.has(stage())
    assert not store.path(stage()).exists()
    assert leftovers(store) == []
    path = store.ensure(stage())
    assert sorted(p.name for p in path.iterdir()) == ["inputs.json", "made"]


def test_a_failed_builds_logs_are_kept_and_named(store: Store) -> None:
    def broken(out: Path) -> None:
        log = out / "deep" / "rpmbuild.log"
        log.parent.mkdir()
        log.write_text("error: here")
        raise BuildError("rpmbuild failed", f"read {log}", [f"see {out}/deep/rpmbuild.log"])

    with pytest.raises(BuildError) as caught:
        store.ensure(stage(build=broken))
    kept = store.root / "failed" / "toy" / "deep" / "rpmbuild.log"
    assert kept.read_text() == "error: here"
    named = Path(caught.value.hint.removeprefix("read "))
    assert named.read_text() == "error: here", f"the hint names {named}"
    assert Path(caught.value.details[0].removeprefix("see ")).exists()


BUILDER = """
import os, pathlib, sys
from pipeline import progress, run
from pipeline.store import Stage, Store

root, flag, mode = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]

def build(out):
    (out / "made").write_text("con")
    if mode == "hang":
        (out / "half").touch()
    with flag.open("a") as stream:
        print(os.getpid(), file=stream)
    if mode == "hang":
        run.run(["sleep", "1000"])
    go = flag.with_name("go")
    if mode == "wait":
        run.wait_until(go.exists, deadline=120, what="the flag", hint="read the test")
    with (out / "made").open("a") as stream:
        stream.write("tent")

progress.configure("plain")
print(Store(root).ensure(Stage("toy", {"a": 1}, build)))
"""


def builder(store: Store, flag: Path, mode: str) -> list[str]:
    """The command line of a real builder of `stage(a=1)`."""
    return [sys.executable, "-c", BUILDER, str(store.root), str(flag), mode]


ENV = {"PYTHONPATH": str(TOP), "PYTHONUNBUFFERED": "1"}


@pytest.mark.runs("python3")
def test_kill_9_in_the_middle_and_the_same_command_again(store: Store, tmp_path: Path, wait_until: Wait) -> None:
    flag = tmp_path / "flag"
    with run.start(builder(store, flag, "hang"), log=tmp_path / "log", env=ENV) as task:
        wait_until(lambda: flag.exists() and flag.read_text().endswith("\n"), "the middle of the build")
        os.kill(task.pid, signal.SIGKILL)
        task.wait(30)
    assert [p.name for p in leftovers(store)] == [f"toy-{stage(a=1).key}"]  # it was in the middle
    assert not store.has(stage(a=1))
    assert not store.path(stage(a=1)).exists()
    run.run(builder(store, flag, "go"), env=ENV)
    assert (store.path(stage(a=1)) / "made").read_text() == "content"
    assert sorted(p.name for p in store.path(stage(a=1)).iterdir()) == ["inputs.json", "made"]
    assert store.verify(store.path(stage(a=1))) == []
    assert leftovers(store) == []


@pytest.mark.runs("python3")
def test_two_builders_at_once_the_second_waits_and_shares(store: Store, tmp_path: Path, wait_until: Wait) -> None:
    flag, logs = tmp_path / "flag", [tmp_path / "first.log", tmp_path / "second.log"]
    with run.start(builder(store, flag, "wait"), log=logs[0], env=ENV) as first:
        wait_until(flag.exists, "the first builder at work")
        with run.start(builder(store, flag, "wait"), log=logs[1], env=ENV) as second:
            wait_until(lambda: "waiting for it" in logs[1].read_text(), "the second builder's notice")
            assert f"is being built by process {first.pid}" in logs[1].read_text()
            assert second.poll() is None
            (tmp_path / "go").touch()
            assert [first.wait(60), second.wait(60)] == [0, 0]
    assert len(flag.read_text().split()) == 1  # built once
    assert "built by another run" in logs[1].read_text()
    assert logs[0].read_text().splitlines()[-1] == logs[1].read_text().splitlines()[-1] == str(store.path(stage(a=1)))
    assert (store.path(stage(a=1)) / "made").read_text() == "content"


@pytest.mark.runs("python3")
def test_the_second_builder_takes_over_when_the_first_is_killed(store: Store, tmp_path: Path, wait_until: Wait) -> None:
    flag, log = tmp_path / "flag", tmp_path / "second.log"
    with run.start(builder(store, flag, "hang"), log=tmp_path / "first.log", env=ENV) as first:
        wait_until(lambda: flag.exists() and flag.read_text().endswith("\n"), "the first builder at work")
        with run.start(builder(store, flag, "go"), log=log, env=ENV) as second:
            wait_until(lambda: "waiting for it" in log.read_text(), "the second builder's notice")
            os.kill(first.pid, signal.SIGKILL)
            assert second.wait(60) == 0
    assert len(flag.read_text().split()) == 2
    assert (store.path(stage(a=1)) / "made").read_text() == "content"


@pytest.mark.runs("python3")
def test_builders_of_different_keys_do_not_wait(store: Store, tmp_path: Path, wait_until: Wait) -> None:
    flag = tmp_path / "flag"
    with run.start(builder(store, flag, "wait"), log=tmp_path / "log", env=ENV) as first:
        wait_until(flag.exists, "the first builder at work")
        store.ensure(stage(a=2))
        assert first.poll() is None
        (tmp_path / "go").touch()
        assert first.wait(60) == 0


def test_a_removal_that_was_cut_short_is_no_obstacle(store: Store) -> None:
    """`prune` takes the record away first; killed then, it leaves a folder that is no result."""
    path = store.ensure(stage(a=1))
    (path / "inputs.json").unlink()
    assert not store.has(stage(a=1))
    (path / "made").write_text("what is left of it")
    assert (store.ensure(stage(a=1)) / "made").read_text() == "content"


# --- a full disk


def test_a_full_disk_is_said_in_so_many_words(store: Store) -> None:
    def build(out: Path) -> None:
        with open("/dev/full", "w") as stream:  # every write to it is refused with ENOSPC
            stream.write("x")

    with pytest.raises(BuildError) as caught:
        store.ensure(stage(build=build))
    assert caught.value.message == f"the disk is full: {store.root}"
    assert caught.value.hint.startswith("invoke clean --store --keep-results 1 ")
    assert leftovers(store) == []
    assert not store.has(stage())


@pytest.mark.runs("dd")
def test_a_full_disk_is_recognised_in_what_a_child_says(store: Store) -> None:
    def build(out: Path) -> None:
        run.run(["dd", "if=/dev/zero", "of=/dev/full", "count=1"], log=out / "build.log", what="compiling")

    with pytest.raises(BuildError) as caught:
        store.ensure(stage(build=build))
    assert caught.value.message == "the disk is full: compiling: dd failed with exit status 1"
    assert caught.value.hint.startswith("invoke clean --store --keep-results 1 ")
    assert "No space left on device" in "\n".join(caught.value.details)


def test_other_system_errors_are_not_called_a_full_disk(store: Store) -> None:
    def build(out: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", "/x")

    with pytest.raises(PermissionError):
        store.ensure(stage(build=build))


def test_too_little_space_is_refused_before_work(store: Store) -> None:
    store.require_space(0.000001, "a note")
    with pytest.raises(BuildError, match=r"a kernel needs 1e\+09 GB free under .*, there are [\d.]+ GB"):
        store.require_space(1e9, "a kernel")


# --- why


def test_why_names_what_changed(store: Store) -> None:
    made: dict[str, Any] = {"version": "1", "config": {"A": "y", "B": "m"}, "patches": ["0001"]}

    def why(**inputs: Any) -> str:
        return store.why(stage(**{**made, **inputs}))

    assert why() == "never built"
    store.ensure(stage(**made))
    assert why(version="2") == "changed: version"
    assert why(config={"A": "y", "B": "y"}) == "changed: config.B"
    assert why(config={"A": "y", "B": "m", "C": "y"}, patches=[]) == "changed: config.C, patches"
    assert why(config={}, patches=[], version="3") == "changed: config.A, config.B, patches and 1 more"
    assert why(extra=1) == "changed: extra"


def test_why_names_a_changed_need(store: Store) -> None:
    store.ensure(stage("top", needs=[stage("base", a=1)]))
    assert store.why(stage("top", needs=[stage("base", a=2)])) == "changed: needs.base"


def test_why_knows_a_result_that_was_removed(store: Store) -> None:
    gone = stage(shape=(1, 2), kind="x")
    path = store.ensure(gone)
    store.ensure(stage(shape=(1, 2), kind="y"))
    assert store.why(stage(shape=(1, 2), kind="z")) == "changed: kind"  # a tuple is a list once it is written
    newest = store.path(stage(shape=(1, 2), kind="y"))
    remove_tree(newest)
    record = json.loads((path / "inputs.json").read_text())
    assert record["inputs"]["shape"] == [1, 2]
    assert store.why(gone) == "the result was removed"


# --- verify and prune


def test_verify_finds_a_changed_byte(store: Store) -> None:
    path = store.ensure(stage())
    assert store.verify(path) == []
    (path / "made").write_text("c0ntent")
    assert store.verify(path) == ["made: wrong hash"]
    (path / "made").write_text("content plus")
    assert store.verify(path) == ["made: 12 bytes instead of 7"]
    (path / "made").unlink()
    assert store.verify(path) == ["made: missing"]


def age(store: Store, each: Stage, seconds: int) -> None:
    os.utime(store.path(each) / "inputs.json", (seconds, seconds))


def test_prune_keeps_the_most_recently_used_of_each_stage(store: Store) -> None:
    stages = [stage(n=n) for n in range(4)]
    for number, each in enumerate(stages):
        store.ensure(each)
        age(store, each, 1000 + number)
    store.ensure(stage("other"))
    store.ensure(stages[0])  # using it makes it the newest
    going = store.prune(2, dry_run=True)
    assert going == [store.path(stages[2]), store.path(stages[1])]
    assert all(store.has(each) for each in stages)
    assert store.prune(2, dry_run=False) == going
    assert [store.has(each) for each in stages] == [True, False, False, True]
    assert not store.path(stages[1]).exists()
    assert store.has(stage("other"))
    assert store.prune(2, dry_run=False) == []


def test_prune_leaves_a_build_at_work_alone(store: Store) -> None:
    """Between its record and its renaming a result lies in tmp/, complete; it is no result of a stage `tmp`."""
    work = store.root / "tmp" / "toy-0123"
    work.mkdir(parents=True)
    (work / "inputs.json").write_text("{}")
    with store.lock("toy-0123"):
        assert store.prune(0, dry_run=False) == []
        assert work.exists()
    # Without its builder it is what a killed run has left.
    assert store.prune(0, dry_run=True) == [work] and work.exists()
    assert store.prune(0, dry_run=False) == [work] and not work.exists()


@pytest.mark.parametrize("how", ["open", "mounted"])
@pytest.mark.runs("unshare", "mount")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, and looks at another process")
def test_prune_leaves_what_is_in_use_alone(store: Store, tmp_path: Path, events: Recorder, how: str) -> None:
    """As a machine its disk, or a build the lower layer of its overlay."""
    path = store.ensure(stage())
    script = {
        "open": 'exec 9<"$1/made"; exec sleep 60',
        "mounted": 'mkdir u w m; mount -t overlay overlay -o "lowerdir=$1,upperdir=u,workdir=w" m; exec sleep 60',
    }[how]
    with run.start(
        ["unshare", "--mount", "sh", "-euc", script, "sh", path], log=tmp_path / "log", cwd=tmp_path
    ) as user:
        run.wait_until(
            lambda: b"sleep" in Path(f"/proc/{user.pid}/cmdline").read_bytes().split(b"\0")[0],
            deadline=10,
            what="the user",
            hint="look",
        )
        assert store.prune(0, dry_run=False) == []
        assert f"{path} stays: process {user.pid} uses it" in events.texts("note")
    assert store.prune(0, dry_run=False) == [path]


def test_prune_of_an_empty_store(store: Store) -> None:
    assert store.prune(3, dry_run=False) == []


def test_a_read_only_store_serves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.ensure(stage())

    def refuse(*_args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert store.ensure(stage()) == path


# --- trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "conf").write_text("a=1\n")
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o755)
    (top / "link").symlink_to("etc/conf")
    (top / "folder-link").symlink_to("etc")
    return top


def link(top: Path, name: str, target: str) -> None:
    """Put a link in the place of whatever is there."""
    (top / name).unlink(missing_ok=True)
    (top / name).symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda top: (top / "etc/conf").write_text("a=2\n"),
    "execute bit on": lambda top: (top / "etc/conf").chmod(0o755),
    "execute bit off": lambda top: (top / "run").chmod(0o644),
    "rename": lambda top: (top / "run").rename(top / "walk"),
    "move": lambda top: (top / "run").rename(top / "etc/run"),
    "new empty file": lambda top: (top / "etc/new").touch(),
    "removal": lambda top: (top / "run").unlink(),
    "link target": lambda top: link(top, "link", "run"),
    "link to a folder": lambda top: link(top, "folder-link", "/etc"),
    "dangling link": lambda top: link(top, "new-link", "nowhere"),
    "link instead of file": lambda top: link(top, "run", "etc/conf"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_tree_digest_sees(tree: Path, change: str) -> None:
    before = tree_digest(tree)
    assert before == tree_digest(tree)
    CHANGES[change](tree)
    assert tree_digest(tree) != before


def narrow(top: Path) -> None:
    """A checkout under umask 077."""
    for name, mode in {"etc/conf": 0o600, "run": 0o700, "etc": 0o700}.items():
        (top / name).chmod(mode)


def compiled(top: Path) -> None:
    (top / "__pycache__").mkdir()
    (top / "__pycache__/x.pyc").touch()


OVERLOOKED: dict[str, Callable[[Path], object]] = {
    "group and others' bits, which git does not keep": narrow,
    "times": lambda top: os.utime(top / "run", (1, 1)),
    "compiled Python": compiled,
    "where it is": lambda top: None,
}


@pytest.mark.parametrize("change", OVERLOOKED)
def test_the_tree_digest_does_not_see(tree: Path, change: str, tmp_path: Path) -> None:
    before = tree_digest(tree)
    OVERLOOKED[change](tree)
    moved = tree.rename(tmp_path / "elsewhere")
    assert tree_digest(moved) == before


def test_the_tree_digest_knows_which_tree_a_file_is_in(tmp_path: Path) -> None:
    """`common/rootfs` and `director/rootfs` are hashed together; a file may move from one to the other."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    (first / "file").write_text("x")
    before = tree_digest(first, second)
    (first / "file").rename(second / "file")
    assert tree_digest(first, second) != before


def test_the_tree_digest_takes_single_files(tmp_path: Path) -> None:
    file = tmp_path / "series"
    file.write_text("0001\n")
    before = tree_digest(file)
    file.write_text("0002\n")
    assert tree_digest(file) != before
    with pytest.raises(BuildError, match="does not exist"):
        tree_digest(tmp_path / "gone")


def test_removing_a_tree_with_read_only_folders(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "deep").mkdir(parents=True)
    (top / "deep/file").touch()
    (top / "deep").chmod(0o555)
    remove_tree(top)
    assert not top.exists()
    remove_tree(top)  # nothing there is nothing to do


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / "top").mkdir()
    (tmp_path / "top/link").symlink_to(tmp_path / "precious")
    remove_tree(tmp_path / "top")
    assert (tmp_path / "precious/file").exists()
