"""Runs that fit a number of hours."""

from __future__ import annotations

import dataclasses

import pytest

from toolkit.budget import Offer, fit
from toolkit.diffusion.errors import BadInput

CHAIN = Offer("progressive", usual=(3000, 2000), training=10 * 3600, data=1800, pictures=2048)
FOLD = Offer("sfddm", usual=(4000,), training=4 * 3600, data=1800, pictures=2048)


def fitted(hours: float, *offers: Offer, asked: bool = False):
    return fit(offers, hours=hours, report=600, asked=asked)


def seconds(found, offer: Offer) -> float:
    """What a fit would take, by the costs of its offer."""
    updates = sum(found.updates) / sum(offer.usual)
    return offer.training * updates + offer.data * found.pictures / offer.pictures + 600


def test_updates_fill_the_hours_less_a_margin_and_phases_keep_their_proportions():
    found = fitted(8, CHAIN, FOLD)
    assert found.method == "progressive" and found.pictures == 2048
    assert found.updates[0] / found.updates[1] == pytest.approx(1.5, rel=0.01)
    assert seconds(found, CHAIN) == pytest.approx(8 * 3600 * 0.9, rel=0.01)
    assert found.says == (
        "8 h allow 65% of the usual updates of method progressive, which was chosen because that is enough "
        "for all of its phases"
    )


def test_a_chain_with_too_few_updates_gives_way_to_one_fold_and_the_sentence_says_so():
    found = fitted(3, CHAIN, FOLD)
    assert found.method == "sfddm" and seconds(found, FOLD) == pytest.approx(3 * 3600 * 0.9, rel=0.01)
    assert "chosen because progressive would have only 25% of its own" in found.says


def test_a_method_that_was_asked_for_is_kept():
    found = fitted(4, CHAIN, asked=True)
    assert found.method == "progressive" and "chosen" not in found.says


def test_in_little_time_the_teacher_paints_fewer_pictures_but_never_too_few():
    slow = dataclasses.replace(FOLD, data=2 * 3600)
    found = fitted(3, slow, asked=True)
    assert 256 < found.pictures < 2048 and seconds(found, slow) == pytest.approx(3 * 3600 * 0.9, rel=0.01)
    assert f"{found.pictures} of the teacher's pictures instead of 2048" in found.says
    assert fitted(12, dataclasses.replace(slow, data=60 * 3600), asked=True).pictures == 256
    kept = fitted(4, dataclasses.replace(slow, fixed=True), asked=True)
    assert kept.pictures == 2048


def test_too_little_time_is_answered_with_what_would_fit_and_that_fits():
    with pytest.raises(BadInput) as caught:
        fitted(0.5, CHAIN, FOLD)
    text = str(caught.value)
    assert "--hours 0.5 is too short on this machine" in text and "method sfddm" in text and "\n" not in text
    least = float(text.split("take about ")[1].split(" h")[0])
    assert fitted(least, CHAIN, FOLD).method == "sfddm"


def test_more_updates_than_were_ever_tried_are_not_made():
    found = fitted(100, CHAIN, FOLD)
    assert found.updates == (12000, 8000) and "more than 4 was never tried" in found.says
