"""What may be asked for at once, whoever asks and whichever way: one table."""

from __future__ import annotations

TEXT = 2_000
"""Characters of a text to search for."""
CONDITIONS, CONDITION = 16, 500
"""Conditions of a search, and characters of each: reading one takes time that grows with the square of its length."""
RESULTS, MOST_RESULTS = 200, 100_000
"""Results of a search: what a server gives, and what an engine in the same process does."""
LEAST_ALIKE, MOST_ALIKE = 0.5, 1.0
"""Cosines from which pictures may count as the same one; below, everything looks like everything."""
DEPTH = 20_000
"""So far down the ranking near duplicates and hubs are looked for, or as far as it takes for the results, if that is
more."""
DUPLICATES = 20
"""Near duplicates told of a result; the others are counted."""
IDS = 1 << 53
"""Ids of items are below this: as JSON's numbers they are whole."""
PATH = 4096
"""Characters of a path."""


class Busy(RuntimeError):
    """More is asked than can be answered; try again."""
