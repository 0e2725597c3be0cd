"""Where the lines, areas and labels of the two charts lie, in the units of their viewBox."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dist_train.evaluation.f1_curve import F1Curve

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 546, 30, 250
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Distances between two labels of an axis."""
Scale = Callable[[ArrayLike], np.ndarray]
"""From values to places along an axis."""


@dataclass(frozen=True)
class Histogram:
    """edges (K+1,) of the scores; right, wrong (K,) pairs of each bin."""

    edges: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


@dataclass(frozen=True)
class Tick:
    """A place along an axis and the text that is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """paths: SVG path data by name; mark: where the threshold lies; level: a dotted line, at the
    F1 without any match; dot: the height of the curve at the threshold."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    paths: dict[str, str]
    mark: Tick | None
    level: Tick | None = None
    dot: float | None = None


def curve_chart(curve: F1Curve, threshold: float) -> Chart | None:
    """Mean F1 along the threshold, that of the matches marked; None with fewer than two entries."""
    if len(curve.f1) < 2:
        return None
    x_low, x_high = float(curve.thresholds[-1]), float(curve.thresholds[0])
    y_low = np.floor(min(curve.base, curve.f1.min()) * 10) / 10
    y_high = np.ceil(max(curve.base, curve.f1.max()) * 10) / 10
    x, y = _scale(x_low, x_high, LEFT, RIGHT), _scale(y_low, y_high, BOTTOM, TOP)
    return Chart(
        x_ticks=_ticks(x_low, x_high, x),
        y_ticks=_ticks(y_low, y_high, y),
        paths={"line": _line(x(curve.thresholds), y(curve.f1))},
        mark=_mark(threshold, x),
        level=Tick(float(y(curve.base)), f"self-match {curve.base:.3f}"),
        dot=float(y(curve.at(threshold))),
    )


def histogram_chart(histogram: Histogram, threshold: float) -> Chart:
    """Right and wrong pairs along the score. The height is logarithmic: near the score floor there
    are far more wrong pairs than there are right ones anywhere."""
    x_low, x_high = float(histogram.edges[0]), float(histogram.edges[-1])
    most = max(int(histogram.right.max()), int(histogram.wrong.max()), 1)
    x, y = _scale(x_low, x_high, LEFT, RIGHT), _scale(0, np.log1p(most), BOTTOM, TOP)
    tens = [10**power for power in range(int(np.log10(most)) + 1)]
    paths = {}
    for kind, counts in (("right", histogram.right), ("wrong", histogram.wrong)):
        tops = np.repeat(y(np.log1p(counts)), 2)
        outline = np.concatenate([[BOTTOM], tops, [BOTTOM]])
        paths[kind] = _line(np.repeat(x(histogram.edges), 2), outline) + "Z"
    return Chart(
        x_ticks=_ticks(x_low, x_high, x),
        y_ticks=[Tick(float(y(np.log1p(count))), f"{count:,}") for count in tens],
        paths=paths,
        mark=_mark(threshold, x),
    )


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """From low … high to start … end; all values in one place if there is only one."""
    width = (high - low) or 1.0
    return lambda value: start + (np.asarray(value) - low) / width * (end - start)


def _ticks(low: float, high: float, scale: Scale) -> list[Tick]:
    """Some six round values."""
    wanted = max(high - low, STEPS[0]) / 6
    step = next((one for one in STEPS if one >= wanted), STEPS[-1])
    values = np.arange(np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6) + 1) * step
    digits = 2 if step < 0.1 else 1
    return [Tick(float(scale(value)), f"{value:.{digits}f}") for value in values]


def _mark(threshold: float, scale: Scale) -> Tick | None:
    """Where the threshold lies; None outside the chart."""
    at = float(scale(threshold))
    return Tick(at, f"{threshold:.3f}") if LEFT <= at <= RIGHT else None


def _line(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data through points (n,)."""
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
