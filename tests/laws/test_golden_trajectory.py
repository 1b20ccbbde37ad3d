"""Trajectory losses and samplers against the numbers that public reference code computes on the same tensors."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from golden_numbers import FOLDER, case_of, differences, in_double as in_double, losses_of, networks, sampled

FILES = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "trajectory").glob("*.json"))}


def named(kind: str) -> list[tuple[str, str]]:
    """(file, case) of every case with this entry under `fewstep`: a method, a sampler or a function."""
    return [(f, case["name"]) for f, doc in FILES.items() for case in doc["cases"] if kind in case["fewstep"]]


@pytest.mark.parametrize(("stem", "name"), named("method"))
def test_a_method_computes_what_its_reference_does(stem: str, name: str) -> None:
    found = differences(*case_of(FILES, stem, name))
    assert {term: off for term, (off, limit) in found.items() if not off <= limit} == {}


@pytest.mark.parametrize(("stem", "name"), named("sampler"))
def test_a_sampler_draws_what_its_reference_does(stem: str, name: str) -> None:
    doc, case = case_of(FILES, stem, name)
    want = torch.tensor(case["expected"]["sample"])
    assert float((sampled(doc, case) - want).abs().max() / want.abs().max()) <= case["tolerance"]


@pytest.mark.parametrize(("stem", "name"), named("function"))
def test_a_schedule_has_the_numbers_of_its_reference(stem: str, name: str) -> None:
    _, case = case_of(FILES, stem, name)
    module, function = case["fewstep"]["function"].rsplit(".", 1)
    got = [getattr(importlib.import_module(module), function)(*args) for args in case["inputs"]["args"]]
    want = torch.tensor(case["expected"]["values"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-12, atol=0)


def test_files_name_their_source_and_a_licence_that_allows_it() -> None:
    for stem, doc in FILES.items():
        sources = [doc["source"]] if "source" in doc else [case["source"] for case in doc["cases"]]
        for source in sources:
            assert {"repository", "commit", "file", "licence"} <= set(source), stem
            assert source["licence"].startswith(("Apache License", "MIT License")), stem
        assert doc["how"].split()[0] in ("executed", "transcribed")
        for case in doc["cases"]:
            # A factor without a reason would hide a difference.
            terms = [t for t in case["expected"].values() if isinstance(t, dict)]
            assert all(("factor" in term) <= ("conversion" in term) for term in terms), stem


def off(stem: str, name: str, term: str, **settings: Any) -> float:
    """The difference of one term once settings of the method are others."""
    doc, case = case_of(FILES, stem, name)
    case["fewstep"]["method"].update(settings)
    return differences(doc, case)[term][0]


def test_scms_own_warm_up_is_not_rcms() -> None:
    assert off("rcm", "scm term, warm-up 0.4", "scm", fade="scm") > 0.4
    assert off("rcm", "scm term, warm-up 0.4", "scm", prior_weight=True) > 0.1


def test_an_unweighted_denoising_error_is_not_ctms() -> None:
    case = ("ctm", "consistency and denoising", "denoise, the reference's karras weight")
    assert off(*case, denoise_error="x0") > 0.7


def test_labels_dropped_where_s_is_t_alone_are_others_than_labels_dropped_anywhere() -> None:
    name = "omega 0.2, kappa 0.92, until 0.75, p 1.0"
    assert off("meanflow", name, "meanflow", drop_at="equal") > 1e-2


@pytest.mark.parametrize("term", ["preserve_forward", "preserve_reverse"])
def test_icd_preserves_without_guidance_whatever_it_decodes_with(term: str) -> None:
    doc, case = case_of(FILES, "icd_embedded_guidance", "all four terms")
    terms = {"preserve_forward": "preserve forward", "preserve_reverse": "preserve reverse"}
    want = case["expected"][terms[term]]["loss"]
    got = float(losses_of(doc, case, networks(doc))[term].detach())
    assert abs(got / want - 1) < 1e-12


def test_shortcuts_finest_legs_are_not_asked_at_their_own_length() -> None:
    doc, case = case_of(FILES, "shortcut", "lengths 1 to 1/64")
    got = float(losses_of(doc, case, networks(doc)).total().detach())
    # The loss whose two legs of 1/128 are asked at 1/128, a length that nothing trains.
    assert abs(got / 2.3519347074164596 - 1) > 1e-5
