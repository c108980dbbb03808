"""Standard errors and 95% intervals of metrics.

    >>> [round(bound, 3) for bound in share_interval(1.0, 60)]
    [0.94, 1.0]

A mean has an analytic standard error. Examples of one unit, such as the questions about an image, are not independent:
their deviations are summed within the unit first (cluster-robust). The interval of a share, a mean of zeros and ones,
is Wilson's, so that 60 right answers of 60 do not look certain. Any other mean has the normal interval, cut at 0 and 1
if its values are from 0 to 1. A metric over the whole corpus, such as F1 or CIDEr-D, is bootstrapped over units.

All of them cover the random choice of examples, not the randomness of training.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np


Z = 1.959964  # 95% of a normal distribution lie within this many standard deviations
BOUNDS = (2.5, 97.5)  # percentiles of a 95% interval
Interval = tuple[float, float]


def number_units(units: Sequence[Hashable]) -> np.ndarray:
    """The units as numbers from 0, of shape `(num,)`, in the order of their first appearance."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return np.array([numbers[unit] for unit in units], dtype=int)


def standard_error(values: Sequence[float], units: Sequence[Hashable] | None = None) -> float | None:
    """
    Standard error of a mean.

    Args:
        values (`Sequence[float]`): One value per example.
        units (`Sequence`, *optional*): The unit of each example. By default, all examples are independent.

    Returns:
        Sample standard deviation / sqrt(n) for independent examples. `None` for fewer than two units.
    """
    numbers = np.arange(len(values)) if units is None else number_units(units)
    num_units = len(set(numbers))
    if num_units < 2:
        return None
    deviations = np.array(values, dtype=float) - math.fsum(values) / len(values)
    sums = np.bincount(numbers, weights=deviations)
    return math.sqrt(math.fsum(sums**2) * num_units / (num_units - 1)) / len(values)


def share_interval(share: float, num: float) -> Interval:
    """
    The 95% interval of a share by Wilson (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        share (`float`): From 0 to 1.
        num (`float`): Number of independent examples.
    """
    scale = 1 + Z**2 / num
    middle = (share + Z**2 / (2 * num)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    # Without the outer bounds, rounding errors could exclude the share itself.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(
    values: Sequence[float], units: Sequence[Hashable] | None = None, are_shares: bool = True
) -> Interval | None:
    """
    The 95% interval of a mean. `None` for fewer than two units. Also `None` if all values are equal and Wilson's
    interval does not apply, because they do not show how much others would differ.

    Args:
        values, units: As for [`standard_error`].
        are_shares (`bool`): Whether the values are from 0 to 1. Otherwise the interval is the normal one, without
            bounds.

    If units have several examples, the interval of a share counts as many independent examples as would have the same
    standard error, and at most one per example. If all values are equal, it counts one per unit.
    """
    error = standard_error(values, units)
    if error is None:
        return None
    mean = math.fsum(values) / len(values)
    if not are_shares or not set(values) <= {0, 1}:
        if len(set(values)) == 1:
            return None
        is_bounded = are_shares and min(values) >= 0 and max(values) <= 1
        low, high = mean - Z * error, mean + Z * error
        return (max(0.0, low), min(1.0, high)) if is_bounded else (low, high)
    num = len(values)
    if units is not None and len(set(units)) < num:
        num = min(num, mean * (1 - mean) / error**2) if error else len(set(units))
    return share_interval(mean, num)


def repeat(corpus_metrics: Callable[[Sequence], dict[str, float]], items: Sequence) -> Callable:
    """The metrics of a corpus as a function of how often each item counts, an array of shape `(num,)`."""
    return lambda times: corpus_metrics([item for item, each in zip(items, times) for _ in range(each)])


def resampled(
    figures: Callable[[np.ndarray], dict[str, float]], units: Sequence[Hashable], num_resamples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """
    Bootstrap: draws as many units as there are, with replacement, and computes the metrics of their examples.

    Args:
        figures (`Callable`): How often each example counts, `(num,)` -> `{name: value}`.
        units (`Sequence`): The unit of each example.

    Returns:
        `{name: values}`, one value per resample. It is nan if a resample lacks the examples that the metric needs.
    """
    numbers = number_units(units)
    num_units = int(numbers.max()) + 1
    draw = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_resamples):
        times = np.bincount(draw.integers(num_units, size=num_units), minlength=num_units)
        drawn.append(figures(times[numbers]))
    names = dict.fromkeys(name for each in drawn for name in each)
    return {name: np.array([each.get(name, np.nan) for each in drawn]) for name in names}


def percentile_interval(values: np.ndarray) -> Interval:
    low, high = np.nanpercentile(values, BOUNDS)
    return float(low), float(high)


def corpus_interval(value: float, values: np.ndarray, num_units: int | None) -> Interval | None:
    """
    The 95% interval of a corpus metric from its bootstrapped `values`. If all of them are 1 or all are 0, such as the
    F1 of answers that are all right, the interval is that of a share of the units. Any other value that no resample
    changes has no interval (`None`).

    Args:
        num_units (`int`, *optional*): Number of units; `None` for a metric that is no share, such as CIDEr-D.
    """
    low, high = percentile_interval(values)
    if low < high:
        return low, high
    return share_interval(value, num_units) if num_units is not None and value in (0, 1) else None
