"""The Triton kernels in the interpreter, in subprocesses because TRITON_INTERPRET must be set before import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import interpreter_cases

PARTS = 2


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).parents[1] / "helpers" / "attention_cases.py"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, str(script), str(part), str(PARTS)], stdout=subprocess.PIPE, env=env, text=True)
        for part in range(PARTS)
    ]
    lines = [line for run in runs for line in run.communicate()[0].splitlines()]
    assert [run.returncode for run in runs] == [0] * PARTS
    return {r["name"]: r for r in map(json.loads, lines)}


@pytest.mark.parametrize("name", list(interpreter_cases()))
def test_interpreted_kernels_match_the_fp64_reference(results, name):
    result = results[name]
    assert len(result["errors"]) >= 6
    wrong = {k: e for k, e in result["errors"].items() if not e <= result["limit"]}
    assert not wrong
