"""What captions end with in common: the trigger words of a set, however loosely they were written."""

from __future__ import annotations

import collections
from collections.abc import Sequence


def common_ending(captions: Sequence[str]) -> str:
    """The words that captions end with: all of them, else two words or more that most of them share.

    Captions of one set are often mixed: "boat in my style", "a kite, in my style." and one that was forgotten.
    """
    words = [caption.split() for caption in captions if caption.split()]
    ending = same_ending(words)
    if ending or not words:
        return ending
    tails = collections.Counter(tuple(map(_bare, caption[-2:])) for caption in words if len(caption) > 1)
    tail, count = tails.most_common(1)[0] if tails else ((), 0)
    if 2 * count <= len(words):
        return ""
    return same_ending([caption for caption in words if tuple(map(_bare, caption[-2:])) == tail])


def same_ending(captions: list[list[str]]) -> str:
    """The words that all of these captions, each a list of words, end with; of a single one all of them."""
    shared: list[str] = []
    for ending in zip(*(reversed(words) for words in captions), strict=False):
        if len({_bare(word) for word in ending}) > 1:
            break
        shared.insert(0, ending[0])
    return " ".join(shared).rstrip(".,;:!?")


def _bare(word: str) -> str:
    return word.rstrip(".,;:!?").casefold()
