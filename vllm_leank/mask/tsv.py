"""Tables of numbers, separated by tabs, a line per layer: LeanK's and DuoAttention's files."""

import io
import warnings

import numpy as np
import numpy.typing as npt


def parse_tsv(data: bytes) -> npt.NDArray[np.float64]:
    """The numbers of a table, `[lines, columns]`; an empty one for no data.

    Raises:
        ValueError: lines of different length, other things than numbers, or not UTF-8.
    """
    with warnings.catch_warnings(action="ignore"):
        return np.loadtxt(io.StringIO(data.decode()), delimiter="\t", comments=None, ndmin=2)
