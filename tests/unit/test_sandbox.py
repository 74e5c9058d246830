"""The sandbox: what is asked of bubblewrap, and what a real command inside sees."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline import run, settings
from pipeline.debroot import EPOCH
from pipeline.errors import BuildError
from pipeline.sandbox import Overlay, Sandbox, require_overlays

Wait = Callable[..., float]
USR: Mapping[Path, str] = {Path("/usr"): "/usr"}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require", lambda name, why, package: f"/usr/bin/{name}")


def options(argv: list[str]) -> list[str]:
    """The part of bubblewrap's command line before the command."""
    return argv[: argv.index("--")]


def pairs(argv: list[str], option: str) -> list[tuple[str, str]]:
    """The two operands of each use of an option."""
    return [(argv[i + 1], argv[i + 2]) for i, word in enumerate(options(argv)) if word == option]


# --- the command line


@pytest.mark.usefixtures("tools")
def test_the_root_is_read_only_unless_writable() -> None:
    assert pairs(Sandbox(Path("/r")).argv(["ls"]), "--ro-bind")[0] == ("/r", "/")
    writable = Sandbox(Path("/r"), writable=True).argv(["ls"])
    assert pairs(writable, "--bind") == [("/r", "/")]
    assert pairs(writable, "--ro-bind") == []


@pytest.mark.usefixtures("tools")
def test_there_is_no_network_and_nothing_of_the_hosts_environment() -> None:
    argv = Sandbox(Path("/r")).argv(["ls"])
    for option in (
        "--unshare-net",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--die-with-parent",
        "--clearenv",
    ):
        assert option in options(argv)
    assert dict(pairs(argv, "--setenv")) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(EPOCH),
    }
    assert argv.index("--clearenv") < argv.index("--setenv")
    assert dict(pairs(Sandbox(Path("/r")).argv(["ls"], env={"A": "1", "TZ": "X"}), "--setenv"))["TZ"] == "X"


@pytest.mark.usefixtures("tools")
def test_the_command_comes_last_and_untouched() -> None:
    argv = Sandbox(Path("/r")).argv(["sh", "-c", "a; b", "--bind"], cwd="/build")
    assert argv[argv.index("--") + 1 :] == ["sh", "-c", "a; b", "--bind"]
    assert options(argv)[options(argv).index("--chdir") + 1] == "/build"


@pytest.mark.usefixtures("tools")
def test_binds_come_after_what_they_are_mounted_on() -> None:
    argv = Sandbox(Path("/r")).argv(["ls"], binds={Path("/h/out"): "/build/out"}, ro_binds={Path("/h/src"): "/build"})
    order = [word for word in options(argv) if word in ("/", "/build", "/build/out")][:4]  # the last is --chdir /
    assert order == ["/", "/build", "/build", "/build/out"]  # root, tmpfs, read-only bind, bind
    assert pairs(argv, "--bind") == [("/h/out", "/build/out")]
    assert ("/h/src", "/build") in pairs(argv, "--ro-bind")


@pytest.mark.usefixtures("tools")
def test_overlays_are_mounted_by_a_helper_in_a_namespace_of_its_own() -> None:
    overlay = Overlay(Path("/lower"), Path("/upper"), Path("/work"), "/build/linux")
    argv = Sandbox(Path("/r")).argv(["make"], overlays=[overlay])
    assert argv[:4] == ["/usr/bin/unshare", "--mount", "--propagation", "private"]
    assert argv[5:7] == [sys.executable, "-I"]
    spec = json.loads(argv[-1])
    assert spec["overlays"] == [{"lower": "/lower", "upper": "/upper", "work": "/work", "token": "@overlay0@"}]
    assert ("@overlay0@", "/build/linux") in pairs(spec["argv"], "--bind")
    assert spec["argv"][-1] == "make"


# --- a real one

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: bubblewrap keeps all capabilities, as in a build"
)


def inside(root: Path, script: str, **options: object) -> str:
    options["ro_binds"] = {**USR, **options.get("ro_binds", {})}  # type: ignore[dict-item]
    return Sandbox(root).run(["sh", "-c", script], **options).stdout  # type: ignore[arg-type]


@pytest.mark.runs("bwrap")
@needs_root
def test_a_command_sees_the_fixed_world(toy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    seen = dict(line.split("=", 1) for line in inside(toy_root, "env", cwd="/build").splitlines())
    assert {name: seen[name] for name in ("HOME", "TZ", "LC_ALL", "SOURCE_DATE_EPOCH", "PWD")} == {
        "HOME": "/root",
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "PWD": "/build",
    }
    assert set(seen) - {"_", "SHLVL", "OLDPWD"} == {
        *("HOME", "TZ", "LC_ALL", "LANG", "SOURCE_DATE_EPOCH", "PWD", "PATH"),
    }
    assert inside(toy_root, "uname -n; pwd", cwd="/build").split() == ["builder", "/build"]


@pytest.mark.runs("bwrap")
@needs_root
def test_a_command_has_no_network(toy_root: Path) -> None:
    lines = inside(toy_root, "cat /proc/net/dev; cat /proc/net/route").splitlines()
    devices = [line.split(":")[0].strip() for line in lines if ":" in line]
    assert devices == ["lo"]
    assert lines[-1].startswith("Iface")  # the heading of an empty routing table


@pytest.mark.runs("bwrap")
@needs_root
def test_a_command_cannot_change_the_root(toy_root: Path) -> None:
    result = Sandbox(toy_root).run(["sh", "-c", "echo x >/etc/file"], ro_binds=USR, check=False)
    assert result.returncode != 0
    assert "ead-only" in result.stderr
    assert list((toy_root / "etc").iterdir()) == []
    inside(toy_root, "set -e; for d in /build /tmp /var/tmp /run /root; do echo x >$d/file; done")
    assert inside(toy_root, "cat", stdin="a text\n") == "a text\n"
    assert not any((toy_root / d / "file").exists() for d in ("build", "tmp", "var/tmp", "run", "root"))


@pytest.mark.runs("bwrap")
@needs_root
def test_a_writable_root_can_be_changed(toy_root: Path) -> None:
    Sandbox(toy_root, writable=True).run(["sh", "-c", "echo x >/etc/file"], ro_binds=USR)
    assert (toy_root / "etc/file").read_text() == "x\n"


@pytest.mark.runs("bwrap")
@needs_root
def test_binds_carry_results_out(toy_root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "source").write_text("source\n")
    inside(
        toy_root,
        "cp source out/result; ! echo x >source 2>/dev/null",
        cwd="/build",
        binds={tmp_path / "out": "/build/out"},
        ro_binds={tmp_path / "source": "/build/source"},
    )
    assert (tmp_path / "out/result").read_text() == "source\n"
    assert (tmp_path / "source").read_text() == "source\n"


@pytest.mark.runs("bwrap")
@needs_root
def test_a_failure_shows_the_command_as_it_is_typed_inside(toy_root: Path) -> None:
    with pytest.raises(BuildError) as caught:
        Sandbox(toy_root).run(["sh", "-c", "echo broken >&2; exit 3"], ro_binds=USR, what="building toy")
    assert caught.value.details[0] == "$ sh -c 'echo broken >&2; exit 3'   # in root-toy"
    assert "bwrap" not in "\n".join(caught.value.details)
    assert caught.value.details[1] == "broken"
    assert caught.value.message == "building toy: sh failed with exit status 3"


@pytest.mark.runs("bwrap", "unshare")
@needs_root
def test_an_overlay_takes_the_changes(toy_root: Path, tmp_path: Path) -> None:
    layers = [tmp_path / name for name in ("lower", "upper", "work")]
    layers[0].mkdir()
    (layers[0] / "Makefile").write_text("old\n")
    (layers[0] / "gone").write_text("x")
    overlay = Overlay(layers[0], layers[1], layers[2], "/build/linux")
    script = "cat Makefile; echo new >Makefile; rm gone; echo made >built"
    (toy_root / "build").mkdir(exist_ok=True)
    assert inside(toy_root, script, cwd="/build/linux", overlays=[overlay]) == "old\n"
    assert (layers[0] / "Makefile").read_text() == "old\n"
    assert sorted(p.name for p in layers[0].iterdir()) == ["Makefile", "gone"]
    assert (layers[1] / "Makefile").read_text() == "new\n"
    again = "cat Makefile built; ls"
    assert inside(toy_root, again, cwd="/build/linux", overlays=[overlay]).split() == [
        *("new", "made", "Makefile", "built"),
    ]
    assert not any(
        "overlay" in line and str(tmp_path) in line for line in Path("/proc/mounts").read_text().splitlines()
    )


@pytest.mark.runs("bwrap", "unshare")
@needs_root
def test_an_overlay_that_cannot_be_mounted_says_which(toy_root: Path, tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "gone", tmp_path / "upper", tmp_path / "work", "/build/linux")
    with pytest.raises(BuildError) as caught:
        inside(toy_root, "true", overlays=[overlay])
    text = str(caught.value)
    assert "cannot mount an overlay" in text
    assert f"lowerdir={tmp_path}/gone" in text


@pytest.mark.runs("unshare", "mount")
@needs_root
def test_where_no_overlay_can_be_mounted_is_said_before_the_work(tmp_path: Path) -> None:
    """On overlayfs itself, which is what a container has."""
    require_overlays(tmp_path)
    assert list(tmp_path.iterdir()) == []
    script = 'mkdir l u w m; mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m; exec "$@"'
    program = "import sys; from pathlib import Path; from pipeline.sandbox import require_overlays as r; r(Path('m'))"
    argv = ["unshare", "--mount", "sh", "-euc", script, "sh", sys.executable, "-c", program]
    result = run.run(argv, cwd=tmp_path, env={"PYTHONPATH": str(settings.TOP)}, check=False)
    assert result.returncode != 0
    assert "no overlay can be mounted under m" in result.stderr and "LVSFORGE_STORE" in result.stderr


@pytest.mark.runs("bwrap", "python3")
@needs_root
def test_kill_9_of_the_task_ends_what_runs_inside(toy_root: Path, tmp_path: Path, wait_until: Wait) -> None:
    (tmp_path / "out").mkdir()
    script = (
        "import pathlib, sys\n"
        "from pipeline.sandbox import Sandbox\n"
        "root, out = map(pathlib.Path, sys.argv[1:])\n"
        "line = 'while :; do date +%N >/build/out/beat; sleep 0.05; done'\n"
        "Sandbox(root).run(['sh', '-c', line], ro_binds={pathlib.Path('/usr'): '/usr'}, binds={out: '/build/out'})\n"
    )
    beat = tmp_path / "out/beat"
    argv = [sys.executable, "-c", script, str(toy_root), str(tmp_path / "out")]
    with run.start(argv, log=tmp_path / "log", env={"PYTHONPATH": str(Path(__file__).parents[2])}) as task:
        wait_until(lambda: beat.exists() and beat.read_text() != "", "the first beat")
        os.kill(task.pid, signal.SIGKILL)
        task.wait(30)
    last = [""]

    def silent() -> bool:
        before, last[0] = last[0], beat.read_text()
        return before == last[0]

    wait_until(silent, "the end of the beats", 10)
    # three more looks, each later than the last: nobody writes any more
    looks = iter([False, False, False, True])
    final = beat.read_text()
    wait_until(lambda: next(looks), "three looks")
    assert beat.read_text() == final


@pytest.mark.build
def test_a_real_build_root_compiles(tmp_path: Path) -> None:
    """The kernel's root, from the user's own store."""
    from pipeline import settings
    from pipeline.debroot import Root, tree
    from pipeline.store import Store

    store = Store()
    root = tree(store, Root("root-kernel", settings.TOP / "kernel" / "root.yaml", store))
    (tmp_path / "a.c").write_text("#include <stdio.h>\nint main(void) { puts(__DATE__); return 0; }\n")
    script = "gcc -Wno-builtin-macro-redefined a.c -o a && ./a; cat /etc/debian_version"
    text = Sandbox(root).run(["sh", "-c", script], binds={tmp_path: "/build/work"}, cwd="/build/work").stdout
    assert text.splitlines()[0] == "Jan  1 2025"  # SOURCE_DATE_EPOCH, not today
    assert text.splitlines()[1].startswith("12.")
