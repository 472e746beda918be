"""Cases in which every pair of choices occurs, for options that have too many combinations to test all."""

import functools
import heapq
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable


def pairwise(allowed: Callable[..., bool] | None = None, /, **options: Iterable[Hashable]) -> list[dict]:
    """A few combinations of the options, such that every pair of values of two options is in at least one of them.

    The same options in the same order give the same cases. Each case is the first combination that adds the most new
    pairs. The search visits all combinations: keep their number below some ten thousand.

    If the values of an option are pairs of two choices, every value of a third option meets each of these pairs.

    Args:
        allowed: takes a combination by name and returns whether it may be a case. A pair that occurs in no such
            combination is left out.
        options: name -> its values.

    Returns:
        Dictionaries of one value per option. The first has the first value of each.
    """
    # A set of pairs is a number with a bit for each pair: tens of thousands of sets of tuples would take seconds.
    bits = defaultdict(lambda: 1 << len(bits))
    combinations = [((), 0)]
    for place, values in enumerate(map(tuple, options.values())):
        combinations = [
            ((*before, value), sum((bits[at, one, place, value] for at, one in enumerate(before)), pairs))
            for before, pairs in combinations
            for value in values
        ]
    if len(options) < 2:
        # If there is only one option, its single values take the place of pairs.
        combinations = [(case, bits[case]) for case, _ in combinations]
    named = [(dict(zip(options, case, strict=True)), pairs) for case, pairs in combinations]
    named = [(case, pairs) for case, pairs in named if allowed is None or allowed(**case)]
    missing = functools.reduce(int.__or__, (pairs for _, pairs in named), 0)
    # The number of new pairs that a combination would add only falls. So the first in the queue is the best one if its
    # number has not changed.
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
    """A test's id for the case: its values in words."""
    words = (re.sub(r"[^\w.]+", " ", str(value)).strip().replace("torch.", "") for value in case.values())
    return "-".join(word.replace(" ", "_") for word in words)
