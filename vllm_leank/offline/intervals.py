"""How sure a measured figure is: intervals at 95%."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000

LEAST = 5
"""So many samples have an interval by bootstrap; fewer say too little of what others would be."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; `low` and `high` are None where nothing tells how sure it is."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio_estimate(sums: Sequence[float], counts: Sequence[float], seed: int = 0) -> Estimate:
    """The sum of `sums` over that of `counts`, with an interval by bootstrap.

    There is one of each for every independent sample, say a prompt. Samples are drawn again with
    replacement, since the tokens of one prompt have much in common. Fewer than `LEAST` samples have
    no interval. Few samples vary less when drawn again than others would: the percentiles are
    further out for these, as far as Student's t is for a mean. (T. C. Hesterberg, What teachers
    should know about the bootstrap, 2015: expanded percentile intervals.)
    """
    above, below = np.asarray(sums, float), np.asarray(counts, float)
    value = float(above.sum() / below.sum())
    n = len(above)
    if n < LEAST:
        return Estimate(value)
    draws = _draws(n, seed)
    out = 100 * NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))
    low, high = np.percentile((draws @ above) / (draws @ below), (out, 100 - out))
    return Estimate(value, float(low), float(high))


def _student(degrees: int) -> float:
    """The 97.5% point of Student's t, to 0.01 from 4 degrees of freedom on.

    (M. Abramowitz and I. A. Stegun, Handbook of mathematical functions, 26.7.5.)
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**i for i, term in enumerate(terms, 1))


@lru_cache(maxsize=2)
def _draws(n: int, seed: int) -> npt.NDArray[np.float64]:
    """How often each of `n` samples is drawn: `[RESAMPLES, n]`, the same for all figures of `n`."""
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return draws.astype(np.float64)


def share_estimate(right: Sequence[int], n: Sequence[int]) -> Estimate:
    """The share of all `right` in all `n`, each a count of every independent sample, say of the
    questions about a prompt; `n` are above 0.

    The interval is Wilson's, wider where bootstrap over the samples says so: questions about one
    prompt may go wrong together.
    """
    drawn = ratio_estimate(right, n)
    low, high = wilson(sum(right), sum(n))
    if drawn.low is not None and drawn.high is not None:
        low, high = min(low, drawn.low), max(high, drawn.high)
    return Estimate(drawn.value, low, high)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share of `right` of `n`, by default at 95%.

    It holds for few samples and for shares of 0 and 1, where bootstrap has no width.
    (E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.)
    """
    share, weight = right / n, z * z / n
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # At the ends one of the bounds is exactly 0 or 1, which rounding would miss.
    low = 0.0 if right == 0 else (middle - half) / (1 + weight)
    high = 1.0 if right == n else (middle + half) / (1 + weight)
    return low, high
