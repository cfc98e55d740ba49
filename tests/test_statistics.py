import pytest

from circuits.statistics import mean_interval


def test_the_interval_is_students():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    # t(0.975, 3) = 3.182446, standard error = 1.290994 / 2
    assert high - mean == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert all(end != end for end in mean_interval([1.0])[1:])
