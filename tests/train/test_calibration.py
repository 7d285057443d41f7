"""Calibration finds the scaling that was hidden in the rows, and its error is what it says it is."""

from __future__ import annotations

import numpy as np
import pytest

from gale.core.errors import DataError
from gale.train.calibration import calibrate, calibrated, expected_calibration_error


def test_platt_scaling_finds_what_the_labels_were_drawn_from() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, 40_000)
    right = draw.random(40_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    fitted = calibrate(logits, right, label="x")
    assert fitted.slope == pytest.approx(0.5, abs=0.03)
    assert fitted.intercept == pytest.approx(-1, abs=0.05)
    assert 0.2 < fitted.threshold < 0.6
    before = expected_calibration_error(1 / (1 + np.exp(-logits)), right)
    after = expected_calibration_error(calibrated(logits, fitted), right)
    assert after < 0.02 < 0.1 < before


def test_rows_that_are_told_apart_perfectly_do_not_make_it_infinitely_sure() -> None:
    logits = np.array([-4.0, -3.0, -2.0, 2.0, 3.0, 4.0])
    fitted = calibrate(logits, logits > 0, label="x")
    assert 0 < fitted.slope < 10
    assert 0.6 < calibrated(logits, fitted)[-1] < 0.95


def test_huge_logits_are_no_trouble() -> None:
    logits = np.array([-900.0, -700.0, 800.0, 900.0] * 3)
    fitted = calibrate(logits, np.array([False, True, True, True] * 3), label="x")
    assert np.isfinite([fitted.slope, fitted.intercept]).all()


@pytest.mark.parametrize("wanted", [True, False])
def test_rows_of_one_kind_teach_nothing(wanted: bool) -> None:
    with pytest.raises(DataError, match="'rude'"):
        calibrate(np.zeros(3), np.full(3, wanted), label="rude")


def test_the_calibration_error_by_hand() -> None:
    chance = np.array([0.9, 0.9, 0.1, 0.1])
    # Two bins: one says 0.9 and is right half of the time, one says 0.1 and never.
    assert expected_calibration_error(chance, np.array([True, False, False, False])) == pytest.approx(
        0.5 * 0.4 + 0.5 * 0.1
    )
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0
