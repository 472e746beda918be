"""Cases in which every pair of choices occurs, for options that have too many combinations to test all."""

import itertools
from collections.abc import Hashable, Iterable


def pairwise(**options: Iterable[Hashable]) -> list[dict]:
    """A few combinations of the options, such that every pair of values of two options is in at least one of them.

    The same options in the same order give the same cases. Each case is the first combination that adds the most new
    pairs. The search visits all combinations: keep their number below some ten thousand.

    Args:
        options: name -> its values.

    Returns:
        Dictionaries of one value per option. The first has the first value of each.
    """
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    # If there is only one option, its single values take the place of pairs.
    pairs = [set(itertools.combinations(one.items(), min(2, len(options)))) for one in combinations]
    missing, cases = set().union(*pairs), []
    while missing:
        best = max(range(len(pairs)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        cases.append(combinations[best])
    return cases
