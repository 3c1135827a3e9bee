"""Charts of any numbers a run may log."""

import math
import re

import pytest

from cluster.charts import Line, chart, sparkline, thinned, ticks, told


def numbers(svg: str) -> list[float]:
    return [float(n) for d in re.findall(r' d="([^"]*)"', svg) for n in re.findall(r"-?\d+\.?\d*", d)]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 3.0], [1e12, 2e12, 1e300], [math.nan] * 3, [1.0, math.nan, 2.0, math.inf]],
)  # fmt: skip
def test_a_chart_of_any_values_stays_in_its_frame(values):
    drawn = str(chart("x", [Line("a", list(enumerate(values)))]))
    assert all(0 <= number <= 360 for number in numbers(drawn))
    assert ("nothing logged yet" in drawn) == (not any(map(math.isfinite, values)))
    assert "nan" not in drawn + str(sparkline(list(enumerate(values))))


def test_a_gap_is_left_where_the_loss_is_no_number():
    drawn = str(chart("x", [Line("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0)])]))
    assert drawn.count('class="line own"') == 2


@pytest.mark.parametrize(
    ("low", "high", "found"), [(0, 1, [0, 0.5, 1]), (0.93, 1.08, [0.95, 1.0, 1.05]), (0, 7, [0, 2, 4, 6])]
)
def test_ticks_are_round(low, high, found):
    assert ticks(low, high, 4) == pytest.approx(found)


def test_numbers_are_told_briefly():
    assert [told(0.25, "share"), told(12000, "number"), told(0.95, "number")] == ["25 %", "12,000", "0.95"]
    assert [told(30, "hours"), told(90, "hours"), told(9000, "hours")] == ["30 s", "1.5 min", "2.5 h"]


@pytest.mark.parametrize("most", [2, 3, 7, 100])
def test_thinned_keeps_both_ends(most):
    found = thinned(range(50), most)
    assert (found[0], found[-1], len(found)) == (0, 49, min(most, 50))
    assert list(found) == sorted(set(found))
