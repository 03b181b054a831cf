from pathlib import Path

import pytest

from d2f_runtime import provenance


def test_sources_without_a_repository_name_their_commit_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("D2F_COMMIT", "0123abc")
    assert provenance.environment("d2f-stream verify model")["commit"] == "0123abc"
    monkeypatch.delenv("D2F_COMMIT")
    assert provenance.environment("d2f-stream verify model")["commit"] == "unknown"
