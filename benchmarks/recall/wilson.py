"""How sure a share of right answers is."""

import math


def interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share of `right` of `n`, by default at 95%.

    It holds for few samples and for shares of 0 and 1, where the usual one has no width.
    (E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.)
    """
    share, weight = right / n, z * z / n
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # At the ends one of the bounds is exactly 0 or 1, which rounding would miss.
    low = 0.0 if right == 0 else (middle - half) / (1 + weight)
    high = 1.0 if right == n else (middle + half) / (1 + weight)
    return low, high
