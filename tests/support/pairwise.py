"""Cases in which every two choices meet, for options of which all combinations would be too many."""

import itertools
from collections.abc import Hashable, Iterable


def pairwise(**options: Iterable[Hashable]) -> list[dict]:
    """Few combinations of the options, such that every pair of values of two options is in at least one of them.

    The same options in the same order give the same cases. Each case is the first combination that adds the most new
    pairs, so all combinations are gone through: keep them below some ten thousand.

    Args:
        options: name -> its values.

    Returns:
        Dictionaries of one value per option. The first has the first value of each.
    """
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    # Of a single option every value.
    pairs = [set(itertools.combinations(one.items(), min(2, len(options)))) for one in combinations]
    missing, cases = set().union(*pairs), []
    while missing:
        best = max(range(len(pairs)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        cases.append(combinations[best])
    return cases
