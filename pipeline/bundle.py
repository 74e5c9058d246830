"""One tar with everything that a builder without a network needs, and the way back into a store.

The first member is an index with the size and SHA-256 of every other; loading takes nothing that the index does
not name, and gives nothing its final name before its hash was checked.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import progress
from pipeline.errors import BuildError, Problems
from pipeline.sources import Sources
from pipeline.store import Store, digest, remove_tree

_INDEX = "index.json"
_FORMAT = 1


def bundle(out: Path, sources: Sources, extra: Mapping[str, Path] | None = None) -> Path:
    """Write a bundle; same contents, same bytes.

    Args:
        out: the tar to write; appears only when complete. What it holds is compressed already, so it is not.
        sources: every pin goes in, and is fetched first where it is missing.
        extra: further directories by a name of one word, for example an archive of Debian packages. Regular
            files only; `load` is told under the same names where they go.

    Raises:
        BuildError: a source cannot be had; or an extra directory is missing, or holds a link or a device.
    """
    found = sources.fetch_all()
    members: dict[str, Path] = {}
    for item in found:
        members[f"sources/sha256/{item.sha256}/{item.path.name}"] = item.path
        if not item.pinned:
            record = sources.shelf.root / "resolved" / f"{item.name}.json"
            members[f"sources/resolved/{record.name}"] = record
    for name, folder in (extra or {}).items():
        members.update({f"extra/{name}/{inside}": path for inside, path in _files(folder)})
    total = sum(path.stat().st_size for path in members.values())
    with progress.step(f"bundling {len(members)} files ({total / 1e6:.0f} MB) into {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        files = {name: [path.stat().st_size, digest(path)] for name, path in sorted(members.items())}
        index = json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n"
        part = out.with_name(f"{out.name}.part")
        try:
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
                tar.addfile(_header(_INDEX, len(index.encode())), io.BytesIO(index.encode()))
                for name, path in sorted(members.items()):
                    with path.open("rb") as stream:
                        tar.addfile(_header(name, path.stat().st_size), stream)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return out


def load(path: Path, store: Store, extra: Mapping[str, Path] | None = None) -> list[str]:
    """Bring a bundle into the store.

    Args:
        path: what `bundle` wrote.
        store: where the sources go.
        extra: where the bundle's extra directories go, by their names; one without a place is left out, with a
            notice.

    Returns:
        The names of the members that were taken.

    Raises:
        BuildError: it is no bundle, or truncated, or a member is not what the index says; nothing is taken then.
    """
    try:
        work = store.root / "tmp/bundle"
        with store.lock(work.name):  # what nobody holds `clean` takes for left
            remove_tree(work)
            work.mkdir(parents=True)
            try:
                with progress.step(f"loading {path}"), tarfile.open(path, "r:") as tar:
                    names = _unpack(tar, path, work)
                return _place(names, work, store, extra or {})
            finally:
                remove_tree(work)
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist", "invoke bundle   (on a machine with a network)") from None
    except (tarfile.TarError, EOFError) as error:
        raise BuildError(f"{path} is truncated or no bundle: {error}", f"copy {path} here again") from None


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A tar header without time, owner or mode of this machine."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    if not folder.is_dir():
        raise BuildError(f"{folder} does not exist and is to be bundled", "build once with a network, then bundle")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BuildError(f"{path} is no regular file and cannot go into a bundle", f"look at {path}")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _unpack(tar: tarfile.TarFile, path: Path, work: Path) -> list[str]:
    """Everything into `work`, checked against the index."""
    first = tar.next()
    stream = tar.extractfile(first) if first is not None and first.name == _INDEX else None
    if stream is None:
        raise BuildError(f"{path} is no bundle: its first member is not {_INDEX}", "invoke bundle")
    index: dict[str, Any] = json.loads(stream.read())
    if index.get("format") != _FORMAT:
        raise BuildError(f"{path} has format {index.get('format')}, this is {_FORMAT}", "bundle with the same checkout")
    files: dict[str, list[Any]] = index["files"]
    problems = Problems()
    seen = []
    for member in tar:
        if member is first:
            continue
        if member.name not in files or not member.isreg() or not _inside(member.name):
            problems.add(member.name, "not in the index, or no regular file below the bundle")
            continue
        size, sha256 = files[member.name]
        target = work / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        content = tar.extractfile(member)
        if content is None:
            continue
        with target.open("wb") as sink:
            shutil.copyfileobj(content, sink, 1 << 20)
        if target.stat().st_size != size:
            problems.add(member.name, f"truncated, {target.stat().st_size} of {size} bytes")
        elif digest(target) != sha256:
            problems.add(member.name, f"wrong hash, the index says {sha256}")
        seen.append(member.name)
    for name in sorted(files.keys() - set(seen)):
        problems.add(name, "missing")
    problems.raise_if_any(str(path), f"copy {path} here again")
    return seen


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] in ("sources", "extra") and ".." not in parts


def _place(names: list[str], work: Path, store: Store, extra: Mapping[str, Path]) -> list[str]:
    taken = []
    left_out = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if parts[0] == "sources":
            target = store.root / name
        elif parts[1] in extra:
            target = extra[parts[1]] / PurePosixPath(*parts[2:])
        else:
            left_out.add(parts[1])
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(work / name, target)
        taken.append(name)
    for other in sorted(left_out):
        progress.note(f"the bundle also holds {other}/, which nothing here asks for")
    return taken
