"""Cleaning removes what can be made again, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import clean, settings


def laid_out(out: Path) -> None:
    (out / "lvs-director" / "1").mkdir(parents=True)
    (out / "lvs-director" / "1" / "image.qcow2").write_text("image")
    (out / "work" / "kernel-lvs").mkdir(parents=True)
    (out / "work" / "kernel-lvs" / "mine.c").write_text("a day's work")
    (out / "repository" / "x86_64").mkdir(parents=True)
    (out / "repository" / "x86_64" / "older.rpm").write_text("a package that nobody builds any more")
    for lab in ("lab", "other"):
        (out / lab).mkdir()
        (out / lab / "state.json").write_text("{}")
        (out / f".{lab}.lock").touch()
    (out / "lab" / "state.json").unlink()  # lost, and its machines run on
    # What an interrupted publication leaves, with the only copy of what is in it.
    (out / ".repository.old").mkdir()
    for file in ("cluster-stories.md", "lab.cluster.yaml.old"):
        (out / file).write_text("a report")
    (out / "image").symlink_to("lvs-director")


def test_artefacts_go_and_what_a_person_uses_stays(tmp_path: Path) -> None:
    laid_out(tmp_path)
    clean.clean_out(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".lab.lock", ".other.lock", ".repository.old", "lab", "other", "repository", "work"]
    assert (tmp_path / "repository" / "x86_64" / "older.rpm").exists()
    assert (tmp_path / "other" / "state.json").exists()
    assert (tmp_path / "work" / "kernel-lvs" / "mine.c").read_text() == "a day's work"


def test_a_dry_run_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out(tmp_path)
    monkeypatch.setattr(settings.current, "dry_run", True)
    clean.clean_out(tmp_path)
    assert (tmp_path / "lvs-director" / "1" / "image.qcow2").exists()


def test_nothing_to_clean_is_no_failure(tmp_path: Path) -> None:
    clean.clean_out(tmp_path / "absent")
