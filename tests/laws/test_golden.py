"""fewstep's losses against the numbers that public reference code computes on the same tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from golden_numbers import FOLDER, case_of, differences, in_double as in_double, losses_of, networks

FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
CASES = [(stem, case["name"]) for stem, doc in FILES.items() for case in doc["cases"]]
OPEN = ("Apache License", "MIT License")
"""Licences under which a reference's numbers may be test data here."""


@pytest.mark.parametrize(("stem", "name"), CASES)
def test_a_method_computes_what_its_reference_does(stem: str, name: str):
    doc, case = case_of(FILES, stem, name)
    found = differences(doc, case)
    assert {term: off for term, (off, limit) in found.items() if not off <= limit} == {}


@pytest.mark.parametrize("stem", FILES)
def test_a_file_names_its_source_and_a_licence_that_allows_it(stem: str):
    doc = FILES[stem]
    assert doc["how"].split()[0] in ("executed", "transcribed")
    assert set(doc["source"]) == {"repository", "commit", "file", "licence"}
    assert doc["source"]["licence"].startswith(OPEN)
    for case in doc["cases"]:
        # A factor without a reason would hide a difference.
        assert all(("factor" in term) <= ("conversion" in term) for term in case["expected"].values())


def changed(stem: str, name: str, **settings: Any) -> dict[str, float]:
    """The differences of a case once settings of its method are others."""
    doc, case = case_of(FILES, stem, name)
    method = case["fewstep"]["method"]
    for key, value in settings.items():
        method[key] = {**method.get(key, {}), **value} if isinstance(value, dict) else value
    return {term: off for term, (off, _) in differences(doc, case).items()}


@pytest.mark.parametrize("weight", ["x0", "v", "eps"])
def test_no_other_weight_is_the_plain_loss_of_a_flow_critic(weight: str):
    assert changed("flow_critic", "critic turn, draw 1", critic={"weight": weight})["velocity error"] > 0.1


def test_the_last_phases_critic_does_not_weigh_as_an_x0_error():
    name = "critic turn, phase 2, paper's clamped weight"
    assert changed("phased_dmd", name, critic={"weight": "x0"})["paper's clamped weight"] > 0.1


def test_twinflows_guided_target_has_the_scale_of_the_official_ratio():
    name, term = "image free, enr 4, aligned", "total, c^2 without its 1e-8"
    assert changed("twinflow", name)[term] < 1e-12
    for share in (3.0, 5.0):
        assert changed("twinflow", name, guidance_share=share)[term] > 1e-3


def test_a_draw_of_another_kind_or_left_over_is_an_error():
    doc, case = case_of(FILES, "sid", "critic turn")
    case["fewstep"]["draws"].append(["normal", "noise"])
    with pytest.raises(AssertionError, match="left 1 draws unused"):
        losses_of(doc, case, networks(doc))
    case["fewstep"]["draws"][0][0] = "uniform"
    with pytest.raises(AssertionError, match="asks for normal, the file has uniform next"):
        losses_of(doc, case, networks(doc))
