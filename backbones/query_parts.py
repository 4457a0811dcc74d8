"""Splitting attention's queries, so that a large picture's scores need not be there all at once.

A query's result depends on no other query: splitting them changes no result.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .strips import even_step

# Matrix products of fewer queries are slow.
FEWEST_QUERIES = 32


class Part(NamedTuple):
    """Some of the queries: rows of their grid, or a part of one row.

    Attributes:
        all: Their place among all queries.
        rows: Their place in the grid.
        columns: Their place in the grid.
    """

    all: slice
    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """How many they are."""
        return self.all.stop - self.all.start


def split_queries(rows: int, columns: int, budget: int, bytes_per_query: int) -> Iterator[Part]:
    """Split a grid of queries into parts of about the same size, the first the largest.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        budget: What the scores of a part may take in bytes, if that is FEWEST_QUERIES at least.
        bytes_per_query: What the scores of a query take.
    """
    most = max(FEWEST_QUERIES, budget // bytes_per_query)
    height = even_step(rows, max(1, most // columns))
    width = even_step(columns, min(most, columns))
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for left in range(0, columns, width):
            right = min(columns, left + width)
            place = slice(top * columns + left, (bottom - 1) * columns + right)
            yield Part(place, slice(top, bottom), slice(left, right))
