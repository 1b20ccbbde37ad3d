"""What is refused is a class of diffusers, is not wrapped, and says why."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from fewstep.config import UserError
from fewstep.networks.diffusers import WRAPPERS, wrapper_of
from fewstep.networks.folder import Folder
from fewstep.networks.refused import NETWORKS, SCHEDULERS, table
from fewstep.networks.scheduler import read_scheduler


def test_networks_are_classes_without_a_wrapper_and_say_why():
    assert sorted(k for k in NETWORKS if not hasattr(diffusers, k)) == []
    assert set(NETWORKS) & set(WRAPPERS) == set()
    for kind, reason in (*NETWORKS.items(), ("LuminaNextDiT2DModel", "no entry has been written for it")):
        folder = Folder(Path("T"), "T", "transformer", {"_class_name": kind}, {}, {})
        with pytest.raises(UserError) as caught:
            wrapper_of(folder)
        assert f"class {kind!r} is not supported: {reason}; supported: " in str(caught.value)


def test_schedulers_are_classes_that_are_not_read_and_say_what_to_do():
    for name, remedy in SCHEDULERS.items():
        assert hasattr(diffusers, name)
        with pytest.raises(UserError) as caught:
            read_scheduler({"_class_name": name, "prediction_type": "epsilon"}, "s.json")
        assert f"s.json: scheduler {name!r} is not supported: {remedy}; known: " in str(caught.value)


def test_the_table_has_all_of_them():
    made = table()
    assert all(f"`{name}`" in made for name in (*NETWORKS, *SCHEDULERS))
    assert all(line.count("|") == 3 for line in made.splitlines() if line.startswith("|"))
