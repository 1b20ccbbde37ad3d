"""The measurement: in a copy, one edit at a time, going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.bench.mutants import main, measure, suite_of, table
from fewstep.config import UserError

SOURCE = "def half(x, y):\n    return x - y\n\n\ndef blind(x):\n    return x + 0\n"
HELD_AND_NOT = "def half(x, y):\n    return x - y\n\n\ndef blind(x):\n    return -x\n"
TEST = "from fewstep.algebra.small import half\n\n\ndef test_half():\n    assert half(3, 1) == 2\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout of one module and one test."""
    files = {"fewstep/algebra/small.py": SOURCE, "tests/algebra/test_small.py": TEST, "tests/algebra/test_a.py": ""}
    for name, text in {**files, "fewstep/__init__.py": "", "fewstep/algebra/__init__.py": ""}.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


def texts(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*.py")}


def test_a_line_that_a_test_holds_is_seen_and_another_survives(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (root / "fewstep/algebra/small.py").write_text(HELD_AND_NOT)
    before = texts(root)
    tried = measure(["algebra"], 99, 0, tmp_path / "out.json", root=root)
    assert {t.edit.after.strip(): t.result for t in tried} == {"return x + y": "killed", "return x": "survived"}
    assert [t.by for t in tried if t.result == "killed"] == ["tests/algebra/test_small.py::test_half"]
    assert texts(root) == before
    shown = table(tried)
    assert f"{'algebra':12}{2:>7}{1:>8}{0:>9}{1:>10}{'50%':>7}" in shown.splitlines()
    assert "fewstep/algebra/small.py:6 (sign)\n  - return -x\n  + return x" in shown


class Script:
    """Answers in place of pytest; remembers the source that it saw."""

    def __init__(self, *codes: Any) -> None:
        self.codes, self.seen = list(codes), []

    def __call__(self, copy: Path, files: list[str], seconds: float) -> tuple[int, str]:
        self.seen.append((copy, (copy / "fewstep/algebra/small.py").read_text(), files, seconds))
        code = self.codes.pop(0)
        if isinstance(code, BaseException):
            raise code
        return code, "FAILED tests/a.py::b - why\n" if code == 1 else ""


def test_an_interrupted_measurement_goes_on_and_a_changed_room_begins_anew(root: Path, tmp_path: Path):
    out, run = tmp_path / "out.json", Script(0, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measure(["algebra"], 3, 0, out, root=root, run=run)
    assert [t["result"] for t in json.loads(out.read_text())["rooms"]["algebra"]["tried"]] == ["killed"]
    again = Script(-1, 0)
    tried = measure(["algebra"], 3, 0, out, 7.0, root=root, run=again)
    assert [(t.result, t.by) for t in tried] == [("killed", "tests/a.py::b"), ("timeout", ""), ("survived", "")]
    # The unedited run, then one edit at a time and each from the whole text.
    seen = [text for _, text, _, _ in run.seen + again.seen]
    assert seen[0] == SOURCE
    assert seen[2] == seen[3]
    assert len(set(seen)) == 4
    assert [s for *_, s in again.seen] == [7.0, 7.0]
    assert all(files[0] == "tests/algebra/test_small.py" for _, text, files, _ in again.seen)
    assert not any(copy.exists() for copy, *_ in run.seen + again.seen)
    assert measure(["algebra"], 3, 0, out, root=root, run=Script()) == tried
    assert measure(["algebra"], 1, 0, out, root=root, run=Script()) == tried[:1]
    (root / "tests/algebra/test_a.py").write_text("# more\n")
    anew = Script(0, 1, 1, 1)
    assert {t.result for t in measure(["algebra"], 3, 0, out, root=root, run=anew)} == {"killed"}
    assert anew.codes == []


def test_what_would_measure_nothing_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match=r"^the tests of algebra fail without an edit:"):
        measure(["algebra"], 1, 0, out, root=root, run=Script(1))
    with pytest.raises(RuntimeError, match=r"^pytest ended with 4 on fewstep/algebra/small\.py:"):
        measure(["algebra"], 1, 0, out, root=root, run=Script(0, 4))
    with pytest.raises(UserError, match=r"has no modules; run this from a checkout$"):
        measure(["train"], 1, 0, out, root=root, run=Script())
    measure(["algebra"], 1, 0, out, root=root, run=Script(0, 1))
    with pytest.raises(UserError, match=r"was drawn with --seed 0, not 5; choose another file with --out$"):
        measure(["algebra"], 1, 5, out, root=root, run=Script())
    for text in ("{", "[]", '{"seed": 0}', '{"seed": 0, "rooms": []}'):
        out.write_text(text)
        with pytest.raises(UserError, match=r"is not a record of mutants; choose another file with --out$"):
            measure(["algebra"], 1, 0, out, root=root, run=Script())
    for arguments in (["--count", "0"], ["--rooms", "attic"], ["--out", str(out)]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert arguments[1] in capsys.readouterr().err or arguments[0] in ("--count",)


def test_the_edited_files_own_test_comes_first():
    root = Path(__file__).resolve().parents[2]
    files = suite_of(root, "methods", "fewstep/methods/sid.py")
    assert files[0] == "tests/methods/test_sid.py"
    assert files[1:] == sorted(f for f in suite_of(root, "methods") if f != files[0] and "/methods/" in f) + sorted(
        f for f in files if "/laws/" in f
    )
    assert any("/laws/" in f for f in files)
    assert not any("/laws/" in f for f in suite_of(root, "algebra"))
