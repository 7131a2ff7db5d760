"""Learning a vocabulary: the merges of a byte-pair encoding (Sennrich et al. 2016, Algorithm 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from ..model.tokenizer import as_bytes, merge_pair, split_words


def train_bpe(texts: Iterable[str], n_merges: int) -> list[tuple[str, str]]:
    """texts -> at most `n_merges` pairs to merge, in order; fewer if every word has become a single token.

    The merges depend only on the words and how often each occurs, not on the order of the texts.
    `Tokenizer(merges)` makes a vocabulary of `len(merges) + 514` tokens from them.

    Source: Sennrich et al. 2016, Algorithm 1, on bytes. Raises ValueError for a negative `n_merges`.
    """
    if n_merges < 0:
        raise ValueError(f"n_merges must be 0 or more, not {n_merges}")
    counts = Counter(word for text in texts for word in split_words(text))
    words = {word: as_bytes(word) for word in counts}
    pairs: Counter[tuple[str, str]] = Counter()
    for word, parts in words.items():
        for pair in pairwise(parts):
            pairs[pair] += counts[word]
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # a tie goes to the first in the alphabet
        merges.append(best)
        for word, parts in words.items():
            if best not in pairwise(parts):
                continue
            words[word] = merge_pair(parts, best)
            pairs.subtract({pair: n * counts[word] for pair, n in Counter(pairwise(parts)).items()})
            pairs.update({pair: n * counts[word] for pair, n in Counter(pairwise(words[word])).items()})
        pairs = +pairs
    return merges
