"""What an earlier seed brought and the present one does not, `drop-stale-files` of the images removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import run

SCRIPT = Path(__file__).parents[2] / "image/common/rootfs/usr/lib/lvsforge/drop-stale-files"
pytestmark = pytest.mark.runs("sh")


def put(root: Path, *names: str, listed: tuple[str, ...] | None = None) -> None:
    for name in names:
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n", encoding="utf-8")
    if listed is not None:
        (root / "etc/lvs").mkdir(parents=True, exist_ok=True)
        (root / "etc/lvs/files").write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")


def drop(root: Path) -> str:
    return run.run(["sh", SCRIPT], env={"LVS_ROOT": str(root)}).stderr


def there(root: Path) -> list[str]:
    return sorted("/" + p.relative_to(root).as_posix() for p in root.rglob("*.conf"))


def test_only_what_the_list_had_and_has_not(tmp_path: Path) -> None:
    files = ("/etc/keepalived/a.conf", "/etc/keepalived/b.conf", "/etc/quagga/ospfd.conf")
    put(tmp_path, *files, "/etc/own.conf", listed=files)
    assert drop(tmp_path) == ""
    put(tmp_path, listed=files[:1])
    assert drop(tmp_path).splitlines() == [
        f"<6>drop-stale-files: {name} came with an earlier seed, removed" for name in files[1:]
    ]
    assert there(tmp_path) == ["/etc/keepalived/a.conf", "/etc/own.conf"]
    # what comes back is not removed by the memory of its going
    put(tmp_path, files[1], listed=files[:2])
    assert drop(tmp_path) == "" == drop(tmp_path)
    assert there(tmp_path) == ["/etc/keepalived/a.conf", "/etc/keepalived/b.conf", "/etc/own.conf"]


def test_without_a_list_nothing_happens(tmp_path: Path) -> None:
    put(tmp_path, "/etc/a.conf")
    assert drop(tmp_path) == ""
    assert there(tmp_path) == ["/etc/a.conf"]
    assert not (tmp_path / "var").exists()


def test_all_of_it_may_go(tmp_path: Path) -> None:
    put(tmp_path, "/etc/a.conf", listed=("/etc/a.conf",))
    drop(tmp_path)
    put(tmp_path, listed=())
    drop(tmp_path)
    assert there(tmp_path) == []


@pytest.mark.parametrize("path", ["/etc/../usr/a.conf", "/usr/a.conf", "etc/a.conf", "/etc/./a.conf", "/"])
def test_it_removes_nothing_elsewhere(path: str, tmp_path: Path) -> None:
    put(tmp_path, "/etc/a.conf", "/usr/a.conf", listed=(path,))
    drop(tmp_path)
    put(tmp_path, listed=())
    drop(tmp_path)
    assert there(tmp_path) == ["/etc/a.conf", "/usr/a.conf"]
