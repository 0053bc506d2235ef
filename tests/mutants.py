"""One-line faults, each of which a test of `make test` notices. `make test-all` runs this file.

A fault is put into a copy of every script that has this line, as shared bodies are the same everywhere."""

import shutil
import sys

import pytest
from conftest import ROOT, SCRIPTS, run

FAULTS = {  # test that fails: (script, line or part of it, what stands there instead)
}


@pytest.mark.slow
@pytest.mark.parametrize("test", FAULTS)
def test_a_fault_is_noticed(test, tmp_path):
    script, old, new = FAULTS[test]
    assert (ROOT / script).read_text().count(old) == 1, f"{script} has not once: {old}"
    copy = tmp_path / "main"
    shutil.copytree(ROOT / "tests", copy / "tests")
    for path in (ROOT / "pyproject.toml", ROOT / "benchmarks", *SCRIPTS):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / path.name)
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", f"tests/{test}"]
    for spoilt, expected in ((False, 0), (True, 1)):
        for path in copy.glob("*.py"):
            path.write_text(path.read_text().replace(old, new) if spoilt else path.read_text())
        done = run(command, cwd=copy, timeout=300)
        assert done.returncode == expected, done.stdout
