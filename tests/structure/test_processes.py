"""What the suite's processes are like: one thread each, and a job that fails fails its test."""

from __future__ import annotations

import os

import pytest
import torch
from processes import apart, two_processes


def tell() -> None:
    print(torch.get_num_threads(), os.environ.get("RANK"))


def fail() -> None:
    print("so far")
    raise ValueError("no further")


def test_every_process_has_one_thread():
    assert torch.get_num_threads() == 1
    assert apart(tell) == "1 None\n"
    assert two_processes(tell) == ["1 0\n", "1 1\n"]


def test_a_job_that_fails_fails_with_what_it_said():
    with pytest.raises(AssertionError, match=r"fail left with 1\nso far\n(.|\n)*ValueError: no further"):
        apart(fail)
