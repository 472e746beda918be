"""Reads what aot/recording.py has written."""

import json
from collections import Counter
from pathlib import Path


def recorded(folder: Path) -> list[tuple[dict, int]]:
    """The launches in ``folder`` and how often each was made, the most frequent ones first."""
    counts = Counter()
    for path in sorted(folder.glob("*.json")):
        counts.update(json.loads(path.read_text()))
    return [(json.loads(text), count) for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
