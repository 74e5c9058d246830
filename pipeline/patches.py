"""A patch series: a `series` file and a folder of mails, read, linted and applied with zero fuzz.

    series                              order, with `#` comments as group headings
    patches/0001-subsystem-what.patch   one `git format-patch` mail, one change, the why in its body

Applying is done here and not by patch(1): context must match to the byte (only its place may have moved, and that
is reported), the whole series is tried in memory before a byte of the tree changes, and a refusal knows its
patch, file, hunk and line.
"""

from __future__ import annotations

import email
import email.policy
import email.utils
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path, PurePosixPath

from pipeline import progress
from pipeline.errors import BuildError, Problems

_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_SUBJECT = re.compile(r"^[A-Za-z0-9_.,/{}* +-]+: \S")
_SUBJECT_MAX = 75  # Documentation/process/submitting-patches.rst: "no more than 70-75 characters"


@dataclass(frozen=True)
class Hunk:
    """One hunk.

    Attributes:
        line: of its `@@` in the patch file, from 1.
        start: first line in the old file that it speaks of, from 1; 0 where the old file is empty.
        old: the lines that must be there, with their line ends.
        new: the lines that take their place.
        trail: how many lines of context stand after the last change; 0 ties the hunk to the end of the file.
    """

    line: int
    start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    trail: int


@dataclass(frozen=True)
class Change:
    """What a patch does to one file.

    Attributes:
        line: of its `diff` in the patch file.
        old: the path before, or None when the file is made.
        new: the path after, or None when the file is removed.
        mode: permission bits that the patch sets, or None.
        hunks: in order; none for a pure rename or mode change.
    """

    line: int
    old: str | None
    new: str | None
    mode: int | None
    hunks: tuple[Hunk, ...]

    @property
    def path(self) -> str:
        """The path to call it by."""
        return self.new or self.old or ""


@dataclass(frozen=True)
class Patch:
    """One mail.

    Attributes:
        path: of the file.
        subject: without the `[PATCH]` prefix.
        changes: in order.
    """

    path: Path
    subject: str
    changes: tuple[Change, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True)
class Section:
    """A group of the series file: the comment and blank lines above it, then names of patches."""

    heading: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """A series folder.

    Attributes:
        root: the folder that holds `series` and `patches/`.
        sections: the series file, in order.
    """

    root: Path
    sections: tuple[Section, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All patches, in order."""
        return tuple(name for section in self.sections for name in section.names)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Their files."""
        return tuple(self.root / "patches" / name for name in self.names)

    def text(self) -> str:
        """The series file."""
        lines = [line for section in self.sections for line in (*section.heading, *section.names)]
        return "".join(f"{line}\n" for line in lines)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(root: Path) -> Series:
    """Read a series folder. A folder without `patches/` and an empty series is a valid, empty series.

    Raises:
        BuildError: no series file; or a name stands twice, is no plain file name, has no file, or a `*.patch`
            file has no line. All at once.
    """
    file = root / "series"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BuildError(f"{file} does not exist", f"create {file}, with one patch name a line") from None
    problems = Problems()
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        place = f"{file}:{number}"
        if name != line or len(name.split()) > 1:
            problems.add(place, "one patch name a line, without blanks; comments have lines of their own")
        elif not name.endswith(".patch") or "/" in name:
            problems.add(place, f"{name} is not the name of a .patch file in patches/")
        elif name in seen:
            problems.add(place, f"{name} stands already in line {seen[name]}")
        elif not (root / "patches" / name).is_file():
            problems.add(place, f"patches/{name} does not exist")
        seen.setdefault(name, number)
    for path in sorted((root / "patches").glob("**/*.patch")):
        if path.relative_to(root / "patches").as_posix() not in seen:
            problems.add(str(path), "is not in the series; add a line, or remove the file")
    problems.raise_if_any(str(file), f"correct {file} or the files in patches/")
    return Series(root, tuple(_sections(lines)))


def _sections(lines: Sequence[str]) -> Iterator[Section]:
    heading: list[str] = []
    names: list[str] = []
    for line in lines:
        is_name = bool(line.strip()) and not line.startswith("#")
        if not is_name and names:
            yield Section(tuple(heading), tuple(names))
            heading, names = [], []
        (names if is_name else heading).append(line)
    if heading or names:
        yield Section(tuple(heading), tuple(names))


def parse(path: Path) -> Patch:
    """Read one patch.

    Raises:
        BuildError: it is no well-formed patch; all problems at once, by `file:line`.
    """
    problems = Problems()
    patch = _parse(path, path.read_bytes(), problems)
    problems.raise_if_any(str(path), f"make it again: invoke series-regenerate, or git format-patch ({path.name})")
    return patch


def _parse(path: Path, raw: bytes, problems: Problems) -> Patch:
    lines = _lines(raw)
    first = _first_diff(lines)
    if first < len(lines) and lines[first].endswith(b"\r\n"):
        problems.add(f"{path}:{first + 1}", "carriage returns: a mailer or editor rewrote the line ends")
        return Patch(path, "", ())
    mail = _mail(b"".join(lines[:first]))
    changes = tuple(_changes(path, lines, first, problems))
    if not changes:
        problems.add(f"{path}:{len(lines)}", "holds no diff")
    return Patch(path, _subject(mail), changes)


def _mail(head: bytes) -> EmailMessage:
    # An mbox line ("From <hash> <date>") is no header.
    if head.startswith(b"From "):
        head = head.split(b"\n", 1)[1] if b"\n" in head else b""
    message = email.message_from_bytes(head, policy=email.policy.default)
    assert isinstance(message, EmailMessage)  # noqa: S101  the policy says so
    return message


def _subject(mail: EmailMessage) -> str:
    text = " ".join(str(mail.get("Subject", "")).split())
    return re.sub(r"^\[PATCH[^\]]*\]\s*", "", text)


def _first_diff(lines: Sequence[bytes]) -> int:
    """The index of the line where the mail ends and the diff begins."""
    for index, line in enumerate(lines):
        if line.startswith(b"diff --git ") or (
            line.startswith(b"--- ") and index + 1 < len(lines) and lines[index + 1].startswith(b"+++ ")
        ):
            return index
    return len(lines)


def _changes(path: Path, lines: Sequence[bytes], at: int, problems: Problems) -> Iterator[Change]:
    """The diffs from line index `at` on; what is wrong goes to `problems`."""
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"diff --git ") or line.startswith(b"--- "):
            change, at = _change(path, lines, at, problems)
            if change is not None:
                yield change
            continue
        if line == b"-- \n":
            problems.add(f"{path}:{at + 1}", "carries a git signature; format-patch --no-signature leaves it out")
            return
        if line.strip():
            problems.add(f"{path}:{at + 1}", f"neither a diff nor a hunk: {_shown(line)}")
        at += 1


def _change(path: Path, lines: Sequence[bytes], at: int, problems: Problems) -> tuple[Change | None, int]:
    begin = at
    names: dict[str, str | None] = {}
    mode: int | None = None
    if match := re.fullmatch(rb"diff --git a/(.+) b/(.+)\n", lines[at]):
        names = {"old": match[1].decode("utf-8", "replace"), "new": match[2].decode("utf-8", "replace")}
        at += 1
    elif lines[at].startswith(b"diff --git "):
        problems.add(f"{path}:{at + 1}", "the paths of a diff begin with a/ and b/")
        at += 1
    while at < len(lines) and not lines[at].startswith((b"@@ ", b"diff --git ")):
        line = lines[at]
        place = f"{path}:{at + 1}"
        if line.startswith((b"GIT binary patch", b"Binary files ")):
            problems.add(place, "binary changes are not supported")
        elif match := re.fullmatch(rb"(new file mode|deleted file mode|new mode|old mode) (\d{6})\n", line):
            if match[2][:3] != b"100":
                problems.add(place, "only regular files are supported, no links or submodules")
            if match[1] == b"new file mode":
                names["old"] = None
            if match[1] == b"deleted file mode":
                names["new"] = None
            if match[1] in (b"new file mode", b"new mode"):
                mode = int(match[2][3:], 8)
        elif line.startswith((b"copy from ", b"copy to ")):
            problems.add(place, "copies are not supported; git format-patch --no-renames")
        elif match := re.fullmatch(rb"(---|\+\+\+) ([^\t\n]+)(?:\t.*)?\n", line):
            side, prefix = ("old", "a/") if match[1] == b"---" else ("new", "b/")
            name = match[2].decode("utf-8", "replace")
            if name == "/dev/null":
                names[side] = None
            elif name.startswith(prefix):
                names[side] = name[2:]
            else:
                problems.add(place, f"the path does not begin with {prefix}")
                names.setdefault(side, name)
        elif line == b"-- \n":
            break
        elif not re.match(rb"(index |similarity |dissimilarity |rename )", line):
            problems.add(place, f"unknown line in the head of a diff: {_shown(line)}")
        at += 1
    old, new = names.get("old"), names.get("new")
    for name in dict.fromkeys(n for n in (old, new) if n is not None):
        if not _is_inside(name):
            problems.add(f"{path}:{begin + 1}", f"{name} is outside of the tree")
    hunks: list[Hunk] = []
    while at < len(lines) and lines[at].startswith(b"@@ "):
        hunk, at = _hunk(path, lines, at, problems)
        if hunk is not None:
            hunks.append(hunk)
    if old is None and new is None:
        problems.add(f"{path}:{begin + 1}", "a diff without a file")
        return None, at
    return Change(begin + 1, old, new, mode, tuple(hunks)), at


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and ".git" not in parts


def _hunk(path: Path, lines: Sequence[bytes], at: int, problems: Problems) -> tuple[Hunk | None, int]:
    begin = at
    place = f"{path}:{begin + 1}"
    match = _HUNK.match(lines[at])
    at += 1
    if match is None:
        problems.add(place, f"not a hunk header: {_shown(lines[begin])}")
        return None, at
    start, old_count, new_count = int(match[1]), _count(match[2]), _count(match[4])
    old: list[bytes] = []
    new: list[bytes] = []
    kinds: list[bytes] = []
    while at < len(lines) and (len(old) < old_count or len(new) < new_count):
        kind, text = lines[at][:1], lines[at][1:]
        if kind == b"\n":
            problems.add(f"{path}:{at + 1}", "an empty line in a hunk: a mailer took the blank that begins it")
            kind, text = b" ", b"\n"
        if kind not in (b" ", b"+", b"-"):
            if kind != b"\\":
                break
            _drop_line_end(old, new, kinds[-1] if kinds else b" ")
        else:
            kinds.append(kind)
            if kind != b"+":
                old.append(text)
            if kind != b"-":
                new.append(text)
        at += 1
    if at < len(lines) and lines[at].startswith(b"\\") and kinds:
        _drop_line_end(old, new, kinds[-1])
        at += 1
    if (len(old), len(new)) != (old_count, new_count):
        problems.add(
            place, f"the hunk says {old_count} old and {new_count} new lines, and has {len(old)} and {len(new)}"
        )
    surplus = at
    while at < len(lines) and lines[at][:1] in (b" ", b"+", b"-") and not _begins_diff(lines, at):
        at += 1
    if at > surplus:
        problems.add(f"{path}:{surplus + 1}", "the hunk goes on after the number of lines that its header says")
    if not any(kind in (b"+", b"-") for kind in kinds):
        problems.add(place, "the hunk changes nothing")
    trail = next((i for i, kind in enumerate(reversed(kinds)) if kind != b" "), 0)
    return Hunk(begin + 1, start, tuple(old), tuple(new), trail), at


def _count(digits: bytes | None) -> int:
    return 1 if digits is None else int(digits)


def _begins_diff(lines: Sequence[bytes], at: int) -> bool:
    if lines[at] == b"-- \n":
        return True
    return lines[at].startswith(b"--- ") and at + 1 < len(lines) and lines[at + 1].startswith(b"+++ ")


def _drop_line_end(old: list[bytes], new: list[bytes], kind: bytes) -> None:
    r"""`\ No newline at end of file` speaks of the line above it."""
    if kind != b"+" and old:
        old[-1] = old[-1].removesuffix(b"\n")
    if kind != b"-" and new:
        new[-1] = new[-1].removesuffix(b"\n")


def _shown(line: bytes) -> str:
    return repr(line.decode("utf-8", "replace").rstrip("\n")[:60])


# -- the letter --------------------------------------------------------------------------------------------------------


def lint(series: Series) -> Problems:
    """Hold every patch of a series against the rules of a letter; also what `parse` would refuse.

    A patch has a sender, a date, a subject `[PATCH] subsystem: what` of at most 75 characters (no `n/m`: numbers
    change with every insertion), a body that says why, and the sender's sign-off; no carriage returns, no blanks
    at the ends of lines outside the diff; and its file is numbered by its place.
    """
    problems = Problems()
    for number, path in enumerate(series.paths, 1):
        if not path.name.startswith(f"{number:04d}-"):
            problems.add(
                str(path), f"is number {number} of the series; invoke series-regenerate names it {number:04d}-…"
            )
        lint_patch(path, path.read_bytes(), problems)
    return problems


def lint_patch(path: Path, raw: bytes, problems: Problems) -> None:
    """The rules for one patch; see `lint`."""
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\r"):
            problems.add(f"{path}:{number}", "a carriage return at the end of the line")
            return  # every other rule would only repeat it
    if raw and not raw.endswith(b"\n"):
        problems.add(f"{path}:{len(lines)}", "no newline at the end of the file")
    _parse(path, raw, problems)
    first = _first_diff([line + b"\n" for line in lines])
    head = lines[:first]
    for number, line in enumerate(head, 1):
        if line != line.rstrip():
            problems.add(f"{path}:{number}", "blanks at the end of the line")
    mail = _mail(b"\n".join(head) + b"\n")

    def place(header: str) -> str:
        start = header.lower().encode() + b":"
        found = (n for n, line in enumerate(head, 1) if line.lower().startswith(start))
        return f"{path}:{next(found, 1)}"

    sender = email.utils.parseaddr(str(mail.get("From", "")))
    if not sender[0] or "@" not in sender[1]:
        problems.add(place("From"), "From: must be a name and an address")
    if mail.get("Date") is None or email.utils.parsedate_tz(str(mail["Date"])) is None:
        problems.add(place("Date"), "Date: is missing or no date")
    for text in _subject_faults(" ".join(str(mail.get("Subject", "")).split())):
        problems.add(place("Subject"), text)
    prose, signers = _body(mail)
    if not prose:
        problems.add(place("Subject"), "the body does not say why")
    if not signers:
        problems.add(place("Subject"), "Signed-off-by: is missing")
    elif sender[1] and sender[1].lower() not in signers:
        problems.add(place("From"), f"the sender {sender[1]} has not signed off")


def _subject_faults(subject: str) -> Iterator[str]:
    if not subject:
        yield "Subject: is missing"
        return
    if not subject.startswith("[PATCH] "):
        yield "Subject: begins with '[PATCH] ', without a number of n"
    text = re.sub(r"^\[[^\]]*\]\s*", "", subject)
    if len(text) > _SUBJECT_MAX:
        yield f"Subject: has {len(text)} characters, at most {_SUBJECT_MAX}"
    if not _SUBJECT.match(text):
        yield "Subject: has the form 'subsystem: what it does'"
    if text.endswith("."):
        yield "Subject: ends with a full stop"


def _body(mail: EmailMessage) -> tuple[str, set[str]]:
    """The prose without trailers, and the addresses that signed off."""
    try:
        text = mail.get_content() if not mail.is_multipart() else ""
    except (KeyError, LookupError):
        text = str(mail.get_payload())
    prose = []
    signers = set()
    for line in str(text).splitlines():
        if line.rstrip() == "---":
            break
        if match := re.match(r"^([A-Z][A-Za-z-]+-by|Fixes|Link|Cc|Closes): *(.*)", line):
            if match[1] == "Signed-off-by":
                signers.add(email.utils.parseaddr(match[2])[1].lower())
        elif line.strip():
            prose.append(line)
    return "\n".join(prose), signers


# -- applying ----------------------------------------------------------------------------------------------------------


@dataclass
class Overlay:
    """A tree with changes that are not written yet.

    Attributes:
        root: the tree.
        files: path to content as it would be; None for a file that goes.
        modes: path to permission bits that a patch sets.
    """

    root: Path
    files: dict[str, bytes | None] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        if name not in self.files:
            path = self.root / name
            if not path.is_file():
                return None
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise BuildError(f"{path} leads out of the tree", f"look at {path}")
            return path.read_bytes()
        return self.files[name]

    def write(self) -> None:
        """Bring the changes into the tree: all contents beside their places first, then the renames."""
        pending = []
        try:
            for name, content in self.files.items():
                path = self.root / name
                if content is None:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f".{path.name}.patching")
                pending.append((beside, path))
                beside.write_bytes(content)
                mode = self.modes.get(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
                beside.chmod(mode)
        except BaseException:
            for beside, _ in pending:
                beside.unlink(missing_ok=True)
            raise
        for beside, path in pending:
            beside.replace(path)
        for name, content in self.files.items():
            if content is None:
                (self.root / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Refusal:
    """A hunk (or a whole file) that does not fit.

    Attributes:
        path: the file in the tree.
        hunk: its number in that file, from 1; 0 for the file as a whole.
        hunks: how many the file has.
        line: where it should be in the file now, from 1; 0 for the file as a whole.
        why: what was found there.
    """

    path: str
    hunk: int
    hunks: int
    line: int
    why: str

    def __str__(self) -> str:
        place = f", hunk {self.hunk} of {self.hunks}, line {self.line}" if self.hunk else ""
        return f"{self.path}{place}: {self.why}"


def try_patch(overlay: Overlay, patch: Patch) -> tuple[list[Refusal], list[str]]:
    """Apply one patch to an overlay.

    Returns:
        What does not fit (the overlay is then as before), and the places where a hunk fitted, but not at its line.
    """
    refusals: list[Refusal] = []
    moved: list[str] = []
    files: dict[str, bytes | None] = {}
    modes: dict[str, int] = {}
    for change in patch.changes:
        before = b"" if change.old is None else (files[change.old] if change.old in files else overlay.read(change.old))
        if before is None:
            refusals.append(Refusal(change.old or "", 0, 0, 0, "the file does not exist"))
            continue
        if change.old is None and overlay.read(change.path) is not None:
            refusals.append(Refusal(change.path, 0, 0, 0, "the file is to be made and exists already"))
            continue
        after = _apply(before, change, refusals, moved)
        if change.old is not None and change.old != change.new:
            files[change.old] = None
        if change.new is not None:
            files[change.new] = after
            if change.mode is not None:
                modes[change.new] = change.mode
        elif after:
            refusals.append(
                Refusal(change.path, 0, 0, 0, "the file is to be removed and holds more than the patch knows")
            )
    if not refusals:
        overlay.files.update(files)
        overlay.modes.update(modes)
    return refusals, moved


def _apply(before: bytes, change: Change, refusals: list[Refusal], moved: list[str]) -> bytes:
    lines = _lines(before)
    result: list[bytes] = []
    done = 0  # lines of `lines` that are in `result`
    shift = 0  # how far the last hunk was from its line
    for number, hunk in enumerate(change.hunks, 1):
        nominal = max(hunk.start - 1, 0) if hunk.old else hunk.start
        at = _find(lines, hunk, nominal + shift, done)
        if at is None:
            why = _explain(lines, hunk, nominal + shift, done)
            refusals.append(Refusal(change.path, number, len(change.hunks), nominal + shift + 1, why))
            continue
        if at != nominal:
            moved.append(f"{change.path}, hunk {number} of {len(change.hunks)}: {at - nominal:+d} lines")
        shift = at - nominal
        result += lines[done:at]
        result += hunk.new
        done = at + len(hunk.old)
    return b"".join([*result, *lines[done:]])


def _lines(content: bytes) -> list[bytes]:
    """Split at newlines only: a form feed or a carriage return inside a line ends none."""
    parts = content.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


def _find(lines: Sequence[bytes], hunk: Hunk, nominal: int, floor: int) -> int | None:
    """Where the old side of a hunk stands: at its line, else at the nearest other place after the last hunk."""
    size = len(hunk.old)
    last = len(lines) - size
    # A hunk of the first line, or without context after its last change, says: this is the beginning, or the
    # end, of the file. It must not fit anywhere else (git apply has the same rule).
    places: Sequence[int] = sorted(range(floor, last + 1), key=lambda at: (abs(at - nominal), at))
    if hunk.start <= 1:
        places = [at for at in places if at == 0]
    if hunk.trail == 0:
        places = [at for at in places if at == last]
    old = list(hunk.old)
    return next((at for at in places if floor <= at <= last and lines[at : at + size] == old), None)


def _explain(lines: Sequence[bytes], hunk: Hunk, nominal: int, floor: int) -> str:
    """Why a hunk does not fit: the change is there already, or the first line that differs."""
    size = len(hunk.new)
    new = list(hunk.new)
    if size and any(lines[at : at + size] == new for at in range(len(lines) - size + 1)):
        return "the change is there already (merged upstream?)"
    if nominal < floor:
        nominal = floor
    for index, expected in enumerate(hunk.old):
        found = lines[nominal + index] if nominal + index < len(lines) else None
        if found is not None and found != expected and found.rstrip(b"\n") == expected.rstrip(b"\n"):
            return f"line {nominal + index + 1} differs in whether a newline ends it"
        if found != expected:
            what = "the end of the file" if found is None else _shown(found)
            return f"expected {_shown(expected)} in line {nominal + index + 1}, found {what}"
    return "the lines are there, but not where the file begins or ends"


def apply(
    tree: Path,
    series: Series,
    *,
    label: str = "",
    hint: str = "",
) -> list[str]:
    """Apply a series to a tree, whole or not at all.

    Args:
        tree: a directory.
        series: what to apply.
        label: what the tree is ("linux 6.12.107"), for the error.
        hint: the next step, for the error.

    Returns:
        The names of the patches that were applied.

    Raises:
        BuildError: a patch is malformed or does not fit exactly; with patch, file, hunk and line. The tree is
            then unchanged.
    """
    overlay = Overlay(tree)
    applied = []
    for path in series.paths:
        patch = parse(path)
        refusals, moved = try_patch(overlay, patch)
        if refusals:
            raise refused(patch, refusals, label or str(tree), hint or f"invoke series-rebase {series.root}")
        if moved:
            progress.warn(f"{patch.name} fits, but not at its lines ({'; '.join(moved[:3])}): invoke series-regenerate")
        applied.append(patch.name)
    overlay.write()
    return applied


def refused(patch: Patch, refusals: Sequence[Refusal], label: str, hint: str) -> BuildError:
    """The error for a patch that does not fit."""
    return BuildError(f"patch {patch.name} does not apply to {label}", hint, [str(refusal) for refusal in refusals])
