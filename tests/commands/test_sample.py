"""A picture is drawn from samples that are numbers, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_teacher import make_teacher

from fewstep.commands import sample
from fewstep.config import UserError
from fewstep.train.product import Product, open_product


def test_a_student_of_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    product = replace(open_product(make_teacher(tmp_path / "T")), trained=None)
    with torch.no_grad():
        product.net.net.model.conv_out.bias.fill_(float("nan"))  # type: ignore[union-attr]

    def opened(path: Path) -> Product:
        return product

    monkeypatch.setattr(sample, "opened", opened)
    with pytest.raises(UserError) as caught:
        sample.draw(tmp_path / "T", 1, None, 6, 0, tmp_path / "grid.png", False)
    assert str(caught.value).startswith(f"{tmp_path / 'T'}: 6 of 6 samples are not finite; nothing was written")
    assert not (tmp_path / "grid.png").exists()
