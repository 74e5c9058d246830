"""Linters and house rules as tests, over every file that git knows or would add.

Each test asserts that it looked at something: a pattern that matches nothing would pass for ever.
"""

from __future__ import annotations

import ast
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline import recipe, run
from pipeline.rpm import link_or_copy
from tests.conftest import find_program

TOP = Path(__file__).parents[2]
# Code that runs on this machine while something is built or tested; what lies under rootfs/ runs inside the images.
OURS = ("pipeline", "kernel", "tools", "image", "provision", "tests", "tasks.py")


# --- the files


@cache
def tracked() -> tuple[Path, ...]:
    """Every file of the checkout that is not ignored, relative to its top."""
    argv = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = run.run(argv, cwd=TOP, what="listing the files").stdout.split("\0")
    return tuple(Path(name) for name in sorted(filter(None, names)) if (TOP / name).is_file())


def found(files: Iterable[Path], what: str) -> list[Path]:
    """The files as a list that is not empty."""
    listed = list(files)
    assert listed, f"no {what} was found: the collector is wrong"
    return listed


@cache
def text_of(path: Path) -> str | None:
    """A file's text, or None for a binary one."""
    data = (TOP / path).read_bytes()
    if b"\0" in data:
        return None
    return data.decode("utf-8", errors="replace")


def texts() -> dict[Path, str]:
    listed = {path: text for path in tracked() if not (TOP / path).is_symlink() and (text := text_of(path)) is not None}
    assert len(listed) > 50
    return listed


def first_line(path: Path) -> str:
    return (text_of(path) or "").partition("\n")[0]


def shell_scripts() -> list[Path]:
    """By suffix or shebang, the ones inside the images' trees included."""
    shebang = re.compile(r"#!\s*(/usr)?/bin/(env\s+)?(ba|da)?sh\b")
    scripts = (p for p in texts() if p.suffix in (".sh", ".bash") or shebang.match(first_line(p)))
    return found(scripts, "shell script")


def yaml_files() -> list[Path]:
    """All but golden cases: some are wrong on purpose."""
    return found((p for p in tracked() if p.suffix in (".yaml", ".yml") and not generated(p)), "YAML file")


def python_files(*, inside_images: bool = False) -> list[Path]:
    """Our Python: by suffix, or by shebang (programs of the images have no suffix)."""
    shebang = re.compile(r"#!.*\bpython3?\b")
    files = (p for p in texts() if p.suffix == ".py" or shebang.match(first_line(p)))
    return found((p for p in files if inside_images or "rootfs" not in p.parts), "Python file")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((TOP / path).read_text(encoding="utf-8"), str(path))


def fail_with(title: str, findings: Iterable[str]) -> None:
    """Fail with one finding a line and no traceback: the traceback would be of this file, not of the finding."""
    listed = sorted(findings)
    if listed:
        pytest.fail("\n".join([f"{title}: {len(listed)}", *(f"  {line}" for line in listed)]), pytrace=False)


def lint(name: str, *arguments: str | Path) -> None:
    """Run a linter at the top of the checkout."""
    program = find_program(name)
    assert program is not None  # else @pytest.mark.runs has skipped the test
    result = run.run([program, *arguments], cwd=TOP, check=False)
    if result.returncode != 0:
        pytest.fail(f"{name} is not content:\n{result.stdout}{result.stderr}", pytrace=False)


# --- linters


@pytest.mark.runs("git", "ruff")
def test_ruff_check() -> None:
    lint("ruff", "check", "--no-cache", "--output-format=concise", *python_files(inside_images=True))


@pytest.mark.runs("git", "ruff")
def test_ruff_format() -> None:
    lint("ruff", "format", "--no-cache", "--check", *python_files(inside_images=True))


@pytest.mark.runs("mypy")
def test_mypy() -> None:
    lint("mypy", "--no-error-summary")


@pytest.mark.runs("git", "shellcheck")
def test_shellcheck() -> None:
    lint("shellcheck", "--external-sources", *shell_scripts())


YAMLLINT = json.dumps(
    {
        "extends": "default",
        "rules": {
            "line-length": {"max": 140},
            "document-start": "disable",  # one document a file
            "truthy": {"check-keys": False},  # `on:` of a workflow file
            "comments": {"min-spaces-from-content": 1},
            "comments-indentation": "disable",  # a commented-out entry stands where the entry would
            "indentation": {"indent-sequences": "consistent"},
            "braces": {"max-spaces-inside": 1},
            "empty-lines": {"max": 2},
        },
    }
)


@pytest.mark.runs("git", "yamllint")
def test_yamllint() -> None:
    lint("yamllint", "--strict", "--format=parsable", "--config-data", YAMLLINT, *yaml_files())


# --- every file


@pytest.mark.runs("git")
def test_no_key_stands_twice_and_no_tab_in_yaml() -> None:
    for path in yaml_files():
        text = text_of(path) or ""
        assert "\t" not in text, f"{path} holds a tab"
        recipe.parse(text, str(path))


@pytest.mark.runs("git")
def test_json_files_are_json() -> None:
    findings = []
    for path in found((p for p in tracked() if p.suffix == ".json"), "JSON file"):
        try:
            json.loads(text_of(path) or "")
        except ValueError as error:
            findings.append(f"{path}: {error}")
    fail_with("JSON", findings)


def generated(path: Path) -> bool:
    """Files whose exact bytes are somebody else's: patches, recordings, licences."""
    return path.suffix in (".patch", ".diff") or path.name == "COPYING" or "cases" in path.parts


@pytest.mark.runs("git")
def test_line_ends() -> None:
    findings = []
    for path, text in texts().items():
        if "\r" in text and not generated(path):
            findings.append(f"{path}: a carriage return")
        if text and not text.endswith("\n") and not generated(path):
            findings.append(f"{path}: no line end at its end")
        if not generated(path):
            lines = enumerate(text.splitlines(), 1)
            findings += [f"{path}:{n}: blanks at the end" for n, line in lines if line != line.rstrip()]
        if re.search(r"^(<{7}|>{7}) ", text, re.M):
            findings.append(f"{path}: a merge conflict")
    fail_with("line ends", findings)


@pytest.mark.runs("git")
def test_scripts_are_executable_and_executables_are_scripts() -> None:
    findings = []
    for path in texts():
        executable = bool((TOP / path).stat().st_mode & stat.S_IXUSR)
        script = first_line(path).startswith("#!")
        if executable and not script:
            findings.append(f"{path}: executable, without a #! line")
        if script and not executable:
            findings.append(f"{path}: a #! line, not executable (chmod +x {path})")
    fail_with("#! lines and modes", findings)


# --- what must not be written anywhere


def _host(*labels: str) -> str:
    return r"\b([a-z0-9-]+\.)*" + r"\.".join(labels) + r"\b"


# Written in pieces, so that this file passes its own test.
FORBIDDEN: dict[str, str] = {
    "the host of a package registry (name the package; the machine's own configuration knows where it is)": "|".join(
        (
            _host("debian", "org"),
            _host("debian", "net"),
            _host("ubuntu", "com"),
            _host("py" + "pi", "org"),
            _host("python" + "hosted", "org"),
            _host("npm" + "js", "(org|com)"),
            _host("crates", "io"),
            _host("ruby" + "gems", "org"),
            _host("proxy", "golang", "org"),
            _host("fedora" + "project", "org"),
            _host("centos", "org"),
            _host("docker", "io"),
            _host("quay", "io"),
        )
    ),
    "a path of one developer's machine": r"/work/(main|lab|shared)\b|/root/\.(pyenv|cache)|/home/[a-z]\w*/|\.pyenv",
    "a secret key": "^-----BEGIN [A-Z ]*" + "PRIVATE KEY",
    "how the text came to be, which is nobody's business here": r"(?i)\b(clau"
    + "de|anthro"
    + r"pic|chat"
    + r"gpt|llm)\b",
    "an installation that checks nothing": r"--no" + r"deps\b|--no" + r"signature\b|--allow-un" + r"authenticated",
}
# File and rule (its first words), with the reason.
TOLERATED: dict[tuple[str, str], str] = {
    ("pipeline/rpm.py", "an installation"): "queries a package that is not signed yet; installs nothing",
    ("image/packages.py", "an installation"): "says that it is not done",
    ("tests/packages/test_tool_packages.py", "an installation"): "queries packages before they are signed",
}


def found_in(file: str, pattern: re.Pattern[str]) -> bool:
    return (TOP / file).exists() and pattern.search(text_of(Path(file)) or "") is not None


@pytest.mark.runs("git")
@pytest.mark.parametrize("rule", FORBIDDEN)
def test_no_forbidden_words(rule: str) -> None:
    pattern = re.compile(FORBIDDEN[rule], re.M)
    excused = {file for (file, words), reason in TOLERATED.items() if rule.startswith(words) and reason}
    findings = [f"{file}: is tolerated and has no finding any more" for file in excused if not found_in(file, pattern)]
    for path, text in texts().items():
        if str(path) in excused or path.name == "COPYING" or path == Path("tests/unit/test_linters.py"):
            continue
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            findings.append(f"{path}:{number}: {match.group()}")
    fail_with(f"written where it must not be: {rule}", findings)


def test_the_forbidden_words_are_recognised() -> None:
    """Each rule on something that it must find and something that it must not."""
    samples = {
        "the host": ("deb http://deb." + "debian.org/debian bookworm main", "Origin: Debian, at mirror.example"),
        "a path": ("see /work/" + "main/pipeline", "/build/work/a.c, /root/.rpmmacros, /home/*/.ssh, ~/.cache"),
        "a secret": ("-----BEGIN OPENSSH " + "PRIVATE KEY-----", '"BEGIN PGP ' + 'PRIVATE KEY BLOCK" not in text'),
        "how": ("written by Clau" + "de", "gpg-agent"),
        "an installation": ("rpm -i --no" + "deps x.rpm", "never without dependencies"),
    }
    assert len(samples) == len(FORBIDDEN)
    for start, (bad, good) in samples.items():
        (rule,) = (rule for rule in FORBIDDEN if rule.startswith(start))
        assert re.search(FORBIDDEN[rule], bad, re.M), rule
        assert not re.search(FORBIDDEN[rule], good, re.M), rule


@pytest.mark.runs("git")
def test_links_in_documents_lead_somewhere() -> None:
    findings = []
    for path in found((p for p in tracked() if p.suffix == ".md"), "document"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(path) or ""):
            if "://" not in target and not (TOP / path.parent / target).exists():
                findings.append(f"{path}: {target} does not exist")
    fail_with("dead links", findings)


# --- house rules of the code


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    """The calls of a function by its dotted name, or by its last part."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in names or name.rpartition(".")[2] in names:
                yield node


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules, and what is taken from them, that a file imports, with lines."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


# Every other way to start a process; pipeline/run.py is the one that may.
STARTERS = (
    *("os.system", "os.popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.posix_spawnp", "pty.spawn"),
    *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell"),
    *(f"os.{verb}" for verb in ("execv", "execve", "execl", "execle", "execlp", "execvp", "execvpe")),
    *(f"os.spawn{form}" for form in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
)
# Programs that do not run on this machine, where pipeline/ is not.
GUESTS = {
    Path("tests/kernel/guest.py"): "process 1 of a guest that has nothing but Python itself",
    Path("tests/kernel/inside/agent.py"): "process 1 of a guest that has no more than Python and what a test runs",
    Path("tests/kernel/inside/toa.py"): "an application of that guest, which has children",
    Path("kernel/inside/forwarding.py"): "process 1 of a guest that has no more than Python and what it measures with",
    Path("kernel/inside/scale.py"): "likewise",
    Path("kernel/inside/synproxy.py"): "likewise",
}
MAY_START = {
    **GUESTS,
    Path("pipeline/run.py"): "the one runner",
    Path("pipeline/enter.py"): "becomes the command that it was started to run",
    Path("pipeline/tap.py"): "likewise",
    Path("tests/unit/test_harness.py"): "shows that the guard refuses each of them",
}


@pytest.mark.runs("git")
def test_only_one_module_starts_processes() -> None:
    findings = []
    for path in python_files():
        if path in MAY_START:
            continue
        for name, line in imports(path):
            if name.split(".")[0] in ("subprocess", "pexpect", "multiprocessing") or name in STARTERS:
                findings.append(f"{path}:{line}: imports {name}")
        findings += [f"{path}:{call.lineno}: {ast.unparse(call.func)}()" for call in calls(path, *STARTERS)]
    fail_with("processes are started by pipeline/run.py only", findings)
    assert any(name == "subprocess" for name, _ in imports(Path("pipeline/run.py")))


@pytest.mark.runs("git")
def test_nobody_sleeps() -> None:
    """Fixed pauses are too long on one machine and too short on the next: poll, with run.wait_until."""
    findings = []
    for path in python_files():
        if path == Path("pipeline/run.py"):
            assert len(list(calls(path, "time.sleep"))) == 1
            continue
        if path in GUESTS:
            continue
        findings += [f"{path}:{call.lineno}" for call in calls(path, "time.sleep", "sleep")]
        findings += [f"{path}:{line}: imports sleep" for name, line in imports(path) if name == "time.sleep"]
    fail_with("somebody sleeps", findings)


@pytest.mark.runs("git")
def test_every_error_has_a_next_step() -> None:
    """`BuildError(message, hint)`: the hint is there and not an empty literal; likewise for its subclasses."""
    kinds = {"BuildError"}
    files = [p for p in python_files() if p.parts[0] != "tests"]
    for path in files:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("BuildError") for base in node.bases):
                own = any(isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in node.body)
                kinds |= set() if own else {node.name}
    count, findings = 0, []
    for path in files:
        for call in calls(path, *kinds):
            count += 1
            hint = (
                call.args[1] if len(call.args) > 1 else next((k.value for k in call.keywords if k.arg == "hint"), None)
            )
            if hint is None and not any(isinstance(arg, ast.Starred) for arg in call.args):
                findings.append(f"{path}:{call.lineno}: without a hint")
            elif isinstance(hint, ast.Constant) and not str(hint.value).strip():
                findings.append(f"{path}:{call.lineno}: with an empty hint")
    assert count > 20
    fail_with("errors without a next step", findings)


@pytest.mark.runs("git")
def test_every_skip_has_a_reason() -> None:
    findings = []
    for path in python_files():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Attribute):
                continue
            name = ast.unparse(node)
            if name in ("pytest.mark.skip", "pytest.mark.xfail", "pytest.mark.skipif"):
                call = next((c for c in calls(path, name) if c.func is node or ast.unparse(c.func) == name), None)
                if call is None:
                    findings.append(f"{path}:{node.lineno}: {name} without a reason")
        for call in calls(path, "pytest.mark.skip", "pytest.mark.xfail", "pytest.mark.skipif"):
            reason = next((k.value for k in call.keywords if k.arg == "reason"), None)
            if reason is None or (isinstance(reason, ast.Constant) and len(str(reason.value)) < 10):
                findings.append(f"{path}:{call.lineno}: {ast.unparse(call.func)} without a reason")
        for call in calls(path, "pytest.skip", "pytest.xfail"):
            if not call.args and not call.keywords:
                findings.append(f"{path}:{call.lineno}: {ast.unparse(call.func)} without a reason")
    fail_with("tests that are left out silently", findings)


@pytest.mark.runs("git")
def test_every_noqa_and_type_ignore_names_its_rule() -> None:
    pattern = re.compile(r"#\s*(noqa(?!:\s*[A-Z])|type:\s*ignore(?!\[))")
    findings = []
    for path in python_files(inside_images=True):
        if path == Path("tests/unit/test_linters.py"):
            continue
        for number, line in enumerate((text_of(path) or "").splitlines(), 1):
            if pattern.search(line):
                findings.append(f"{path}:{number}: {line.strip()}")
    fail_with("findings that are tolerated wholesale", findings)


@pytest.mark.runs("git")
def test_templates_refuse_what_is_undefined() -> None:
    findings, count = [], 0
    for path in python_files():
        for call in calls(path, "jinja2.Environment", "jinja2.Template", "Environment", "Template"):
            if not any(name.startswith("jinja2") for name, _ in imports(path)):
                continue
            count += 1
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if not given.get("undefined", "").endswith("StrictUndefined"):
                findings.append(f"{path}:{call.lineno}: {ast.unparse(call.func)} without undefined=StrictUndefined")
    assert count, "no template environment was found: the collector is wrong"
    fail_with("templates that let missing values through", findings)


@pytest.mark.runs("git")
def test_paths_are_not_compared_as_texts() -> None:
    """`/tmp/tree2` starts with `/tmp/tree` and is not inside it: Path.is_relative_to."""
    findings = []
    for path in python_files():
        for call in calls(path, "startswith"):
            if isinstance(call.func, ast.Attribute):
                subject = ast.unparse(call.func.value)
                if re.match(r"(str|os\.fspath)\(.*(path|file|folder|tree|root)", subject):
                    findings.append(f"{path}:{call.lineno}: {ast.unparse(call)}")
    fail_with("paths compared as texts", findings)


SITTING = 750  # lines: what can be read in one sitting


@pytest.mark.runs("git")
def test_modules_can_be_read_in_one_sitting() -> None:
    sizes = {path: (text_of(path) or "").count("\n") for path in python_files(inside_images=True)}
    fail_with(
        f"modules of more than {SITTING} lines", (f"{path}: {size}" for path, size in sizes.items() if size > SITTING)
    )


@pytest.mark.runs("git")
def test_the_engine_knows_nothing_of_the_rooms() -> None:
    """Data flows left to right: pipeline imports no room, a room imports only what stands to its left."""
    order = ("pipeline", "kernel", "tools", "image", "provision")
    allowed = {
        "pipeline": {"pipeline"},
        "kernel": {"pipeline", "kernel"},
        "tools": {"pipeline", "tools"},
        "image": {"pipeline", "kernel", "tools", "image"},
        "provision": {"pipeline", "provision"},
    }
    findings = []
    for path in found((p for p in python_files() if p.parts[0] in order), "module of a room"):
        for name, line in imports(path):
            room = name.split(".")[0]
            if room in order and room not in allowed[path.parts[0]]:
                findings.append(f"{path}:{line}: imports {name}")
    fail_with("a room knows what stands to its right", findings)


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """A function's body without its docstring."""
    body = function.body
    return body[1:] if ast.get_docstring(function) is not None else body


TASKS = (Path("tasks.py"), Path("provision/tasks.py"))


@pytest.mark.runs("git")
def test_the_tasks_are_wiring() -> None:
    """Tasks are names and wiring only: no decision, and at most three statements a task."""
    findings = []
    deciding: tuple[type[ast.AST], ...] = (ast.If, ast.While, ast.Try, ast.With, ast.Lambda, ast.ListComp)
    for path in TASKS:
        assert path in tracked()
        tasks = [node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)]
        assert len(tasks) >= 10
        for task in tasks:
            if len(statements(task)) > 3:
                findings.append(f"{path}:{task.lineno}: {task.name} has {len(statements(task))} statements")
            for node in ast.walk(task):
                if isinstance(node, deciding):
                    findings.append(f"{path}:{getattr(node, 'lineno', 0)}: {task.name} decides: {type(node).__name__}")
            if not task.name.startswith("_") and not ast.get_docstring(task):
                findings.append(f"{path}:{task.lineno}: {task.name} has no help")
        if (size := (text_of(path) or "").count("\n")) > 300:
            findings.append(f"{path}: {size} lines")
    fail_with("logic in tasks", findings)


# --- that the rules above can fail


def rule_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: Callable[[], Any], name: str, text: str) -> None:
    """Let a rule look at one file more, which it must not like."""
    here = tmp_path / "checkout"
    for path in tracked():
        target = here / path
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(TOP / path, target)
    extra = here / name
    extra.parent.mkdir(parents=True, exist_ok=True)
    extra.unlink(missing_ok=True)  # it may be a link to the real one
    extra.write_text(text)
    if text.startswith("#!") and "mode" not in name:
        extra.chmod(0o755)
    everything = (*(p for p in tracked() if p != Path(name)), Path(name))
    module = __name__
    monkeypatch.setattr(f"{module}.TOP", here)
    monkeypatch.setattr(f"{module}.tracked", lambda: everything)
    text_of.cache_clear()
    tree_of.cache_clear()
    try:
        with pytest.raises((pytest.fail.Exception, AssertionError, Exception)) as caught:
            rule()
        assert Path(name).name in str(caught.value), f"the rule failed for another reason: {caught.value}"
    finally:
        text_of.cache_clear()
        tree_of.cache_clear()


BREACHES: dict[str, tuple[Callable[[], None], str, str]] = {
    "subprocess": (test_only_one_module_starts_processes, "image/breach.py", "import subprocess\n"),
    "popen": (test_only_one_module_starts_processes, "image/breach.py", "import os\nos.popen('ls')\n"),
    "sleep": (test_nobody_sleeps, "tests/image/breach.py", "import time\ntime.sleep(1)\n"),
    "sleep by name": (test_nobody_sleeps, "tests/image/breach.py", "from time import sleep\n"),
    "no hint": (test_every_error_has_a_next_step, "image/breach.py", "raise BuildError('it broke')\n"),
    "empty hint": (
        test_every_error_has_a_next_step,
        "image/breach.py",
        "raise errors.BuildError('it broke', hint=' ')\n",
    ),
    "no hint in a subclass": (
        test_every_error_has_a_next_step,
        "image/breach.py",
        "class Broken(BuildError):\n    'x'\nraise Broken('it broke')\n",
    ),
    "bare skip": (test_every_skip_has_a_reason, "tests/breach.py", "@pytest.mark.skip\ndef test_a(): ...\n"),
    "skipif": (test_every_skip_has_a_reason, "tests/breach.py", "@pytest.mark.skipif(True)\ndef test_a(): ...\n"),
    "skip()": (test_every_skip_has_a_reason, "tests/breach.py", "pytest.skip()\n"),
    "noqa": (test_every_noqa_and_type_ignore_names_its_rule, "image/breach.py", "x = 1  # no" + "qa\n"),
    "type": (test_every_noqa_and_type_ignore_names_its_rule, "image/breach.py", "x = 1  # type: ig" + "nore\n"),
    "undefined": (
        test_templates_refuse_what_is_undefined,
        "image/breach.py",
        "import jinja2\nx = jinja2.Environment(autoescape=False)\n",
    ),
    "prefix": (test_paths_are_not_compared_as_texts, "image/breach.py", "str(path).startswith(str(top))\n"),
    "size": (test_modules_can_be_read_in_one_sitting, "image/breach.py", "\n" * 800),
    "direction": (test_the_engine_knows_nothing_of_the_rooms, "pipeline/breach.py", "from kernel import build\n"),
    "tasks": (test_the_tasks_are_wiring, "tasks.py", "def a(c):\n    'x'\n    if c:\n        pass\n" * 12),
    "carriage return": (test_line_ends, "image/breach.yaml", "a: 1\r\n"),
    "no line end": (test_line_ends, "image/breach.yaml", "a: 1"),
    "conflict": (test_line_ends, "image/breach.yaml", "<<" + "<<<<< HEAD\na: 1\n"),
    "script mode": (test_scripts_are_executable_and_executables_are_scripts, "image/breach-mode.sh", "#!/bin/sh\n"),
    "tab": (test_no_key_stands_twice_and_no_tab_in_yaml, "image/breach.yaml", "a:\t1\n"),
    "key twice": (test_no_key_stands_twice_and_no_tab_in_yaml, "image/breach.yaml", "a: 1\na: 2\n"),
    "json": (test_json_files_are_json, "image/breach.json", "{"),
    "link": (test_links_in_documents_lead_somewhere, "image/breach.md", "[a](gone.md)\n"),
    "shell": (test_shellcheck, "image/rootfs/breach", "#!/bin/sh\necho $1\n"),
    "yaml": (test_yamllint, "image/breach.yaml", "a:   1\n"),
    "ruff": (test_ruff_check, "image/breach.py", '"""X."""\nimport os\n'),
    "format": (test_ruff_format, "image/breach.py", "x = 'y'\n"),
}


@pytest.mark.runs("git", "ruff", "shellcheck", "yamllint")
@pytest.mark.parametrize("breach", BREACHES)
def test_each_rule_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, breach: str) -> None:
    rule_on(monkeypatch, tmp_path, *BREACHES[breach])
