"""doctor and demo on the command line. bench is in test_bench.py."""

from pathlib import Path
from pydoc_data import topics

import pytest
from terminal import as_json, isolate, run, tree, write_model

from mlx_impl import demo


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_a_home_that_cannot_be_made_is_no_reason_to_refuse_a_named_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIMAC_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("MINIMAC_MODEL", str(model))
    assert as_json("doctor")["model"] == str(model)
    assert as_json("list")["domains"] == []
    monkeypatch.delenv("MINIMAC_MODEL")
    assert as_json("doctor")["model"] is None


def test_doctor(tmp_path: Path) -> None:
    record = as_json("doctor")
    assert record["model"] is None
    assert {"mlx", "numpy"} <= set(record["packages"])
    assert record["memory_bytes"] > 2**28
    lines = run("doctor").out.splitlines()
    assert "model     none yet: run `minimac-mlx pull`" in lines
    assert lines[-1] == "all is well" or lines[-1].startswith("! ")


@pytest.mark.parametrize("there", [True, False])
def test_a_default_that_is_no_model_is_told(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By doctor too, and with what names it: pulling another one would not help."""
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("MINIMAC_MODEL", str(tmp_path / ("photos" if there else "gone")))
    for done in (run("doctor"), run("list")):
        assert "MINIMAC_MODEL names it" in done.out + done.err
        assert "all is well" not in done.out


@pytest.mark.parametrize("named", [True, False])
def test_demo(named: bool, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "topics", {name: topics.topics[name] for name in sorted(topics.topics)[:16]})
    monkeypatch.setattr(demo, "pull", lambda progress: model)
    before = tree(model)
    if named:
        record = as_json("demo", "--seconds", "1.5", "--model", write_model(tmp_path / "mine"), "--quiet")
        assert record["model"] == str(tmp_path / "mine")
        assert record["train"]["steps"] >= 1
        assert record["learn"]["domain"] == "python"
        assert record["learn"]["answer_undone"] == record["learn"]["answer_before"]
        assert record["learn"]["domains_left"] == []
    else:
        done = run("demo", "--seconds", "1.5", "--quiet")
        assert (done.code, done.err) == (0, "")
        assert str(model) in done.out
        assert "the very same answer as before" in done.out
    assert tree(model) == before
