"""The folder name collides with the kernels package of the Hugging Face hub; neither may break the other."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_folder_used_as_a_top_level_module_says_what_to_import():
    result = run("import kernels; from kernels import attention")
    assert result.returncode != 0
    assert "ImportError: import fewstep.kernels, not kernels" in result.stderr


def test_importing_the_package_needs_neither_triton_nor_diffusers():
    result = run("import sys, fewstep.kernels; print([m for m in ('triton', 'diffusers') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr
