"""Cases in which every two choices meet, for options of which all combinations would be too many."""

import functools
import heapq
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable


def pairwise(allowed: Callable[..., bool] | None = None, /, **options: Iterable[Hashable]) -> list[dict]:
    """Few combinations of the options, such that every pair of values of two options is in at least one of them.

    The same options in the same order give the same cases. Each case is the first combination that adds the most new
    pairs, so all combinations are gone through: keep them below some ten thousand.

    An option whose values are tuples of two choices makes these two meet every third one.

    Args:
        allowed: says of a combination, given by name, whether it may be a case. A pair that no such combination has is
            left out.
        options: name -> its values.

    Returns:
        Dictionaries of one value per option. The first has the first value of each.
    """
    # Sets of pairs are numbers, a bit for each pair: tens of thousands of sets of tuples would take seconds.
    bits = defaultdict(lambda: 1 << len(bits))
    combinations = [((), 0)]
    for place, values in enumerate(map(tuple, options.values())):
        combinations = [
            ((*before, value), sum((bits[at, one, place, value] for at, one in enumerate(before)), pairs))
            for before, pairs in combinations
            for value in values
        ]
    if len(options) < 2:
        # There are no pairs, so each value counts.
        combinations = [(case, bits[case]) for case, _ in combinations]
    named = [(dict(zip(options, case, strict=True)), pairs) for case, pairs in combinations]
    named = [(case, pairs) for case, pairs in named if allowed is None or allowed(**case)]
    missing = functools.reduce(int.__or__, (pairs for _, pairs in named), 0)
    # What a combination adds only becomes less, so the first one that still adds what it last did is the best.
    queue = [(-pairs.bit_count(), index) for index, (_, pairs) in enumerate(named)]
    heapq.heapify(queue)
    cases = []
    while missing:
        _, index = heapq.heappop(queue)
        case, pairs = named[index]
        now = (-(pairs & missing).bit_count(), index)
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
        else:
            missing &= ~pairs
            cases.append(case)
    return cases


def name_of(case: dict) -> str:
    """The case as a test's id: its values in words."""
    words = (re.sub(r"[^\w.]+", " ", str(value)).strip().replace("torch.", "") for value in case.values())
    return "-".join(word.replace(" ", "_") for word in words)
