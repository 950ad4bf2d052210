"""What an index's factory string says of its searches, without opening it."""

from __future__ import annotations

import re

# Codes whose distances do not depend on what else is found: exact ones, scalar and product quantizers, RaBitQ of one
# bit. Not so: fast scans of 4-bit codes (ties, of which another choice is made for each k), RaBitQ of several bits
# (what cannot be among the k nearest is left out by an estimate), re-ranking (of so many candidates for each
# neighbour), and graphs (the wider the search, the more neighbours are asked for).
_SCANS = re.compile(r"Flat|SQ\w+|PQ\d+(x\d+)?(np)?|RaBitQ(fs)?")
_GRAPH = re.compile(r"(HNSW|NSG|NNDescent)\d*")
_DISTANCES_KEPT = re.compile(r"RR\d*|IVF\w+(\(.*\))?|IMI\w+|HNSW\d+|NSG\d+|IDMap2?|Flat")


def first_of_more_are_fewer(factory: str) -> bool:
    """Whether the first neighbours of a search are those that a search for so many finds; False where it is unknown."""
    *before, last = factory.split(",")
    return _SCANS.fullmatch(last) is not None and not any(map(_GRAPH.match, before))


def has_exact_distances(factory: str) -> bool:
    """Whether a search's distances are those to the keys themselves; False where it is unknown."""
    *before, last = factory.split(",")
    if last in ("RFlat", "Refine(Flat)"):
        return True
    is_flat = last == "Flat" or re.fullmatch(r"(HNSW|NSG)\d+", last) is not None
    return is_flat and all(map(_DISTANCES_KEPT.fullmatch, before))
