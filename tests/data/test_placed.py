"""Where encoders compute: the accelerator, what a run says, or a device by name that is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.config import UserError
from fewstep.data.placed import device_named, encoding, placed, tell


def test_an_accelerator_is_taken_unless_another_device_is_said(monkeypatch: pytest.MonkeyPatch):
    found: list[Any] = [torch.device("cuda")]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found[0])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert placed() == torch.device("cuda")
    with encoding(torch.device("cuda", 1)):
        assert placed() == torch.device("cuda", 1)
        with encoding("cpu"):
            assert placed() == torch.device("cpu")
        with encoding():
            assert placed() == torch.device("cuda", 1)
    assert [str(device_named(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "mps", "gpu", "cpu:1"):
        with pytest.raises(UserError, match=rf"^device {name}: is not here; there is cpu, cuda:0, cuda:1$"):
            device_named(name)
    found[0] = None
    assert placed() == torch.device("cpu")
    with pytest.raises(UserError, match=r"^device cuda: is not here; there is cpu$"), encoding("cuda"):
        pass


def test_who_listens_hears_how_far_it_is():
    heard: list[tuple[int, int]] = []
    tell(1, 2)
    with encoding(told=lambda *told: heard.append(told)), encoding("cpu"):
        tell(3, 4)
    tell(5, 6)
    assert heard == [(3, 4)]
