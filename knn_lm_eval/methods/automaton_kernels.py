# mypy: disable-error-code="no-untyped-def"
"""A step of RetoMaton, compiled: following pointers, gathering candidates, and who of them survives.

Arrays have a row per walk; rows are filled from the left, and what lies beyond a row's count means nothing.
"""

from __future__ import annotations

import math

import numpy as np

from knn_lm_eval.compiling import compiled


# None of these is parallel: a step of few sequences takes less time than waking threads would.
@compiled
def _add(table, entry):
    """Add an entry to an open-addressing hash set; False where it was there already."""
    slot = (entry * 0x9E3779B1) & (len(table) - 1)
    while table[slot] != -1:
        if table[slot] == entry:
            return False
        slot = (slot + 1) & (len(table) - 1)
    table[slot] = entry
    return True


@compiled
def _hash_set(capacity):
    size = 8
    while size < 2 * capacity:
        size *= 2
    return np.full(size, -1, dtype=np.int64)


@compiled
def follow(survivors, survivor_counts, cluster_of_entry, member_starts, members, kept, max_knns, merge):
    """The survivors' pointers, then the other members of the pointers' clusters, ``max_knns`` at most.

    The cluster with most pointers in it comes first, of equal ones that with the smaller number; within a
    cluster entries are in text order.

    Parameters
    ----------
    survivors, survivor_counts : int64 ``[n, width]`` and ``[n]``.
    cluster_of_entry, member_starts, members : the clusters in CSR form; empty without any.
    kept : uint8 ``[count / 8]``, a bit for each entry, set for members that count; none where all do.
    merge : whether each entry is taken once.

    Returns
    -------
    int64 ``[n, max_knns]`` and how many there are, ``[n]``.
    """
    n = len(survivors)
    pointers = np.empty((n, max_knns), dtype=np.int64)
    counts = np.zeros(n, dtype=np.int64)
    for i in range(n):
        count = min(survivor_counts[i], max_knns)
        for j in range(count):
            pointers[i, j] = survivors[i, j] + 1
        if 0 < count < max_knns and len(cluster_of_entry):
            seen = _hash_set(max_knns if merge else 1)
            if merge:
                for j in range(count):
                    _add(seen, pointers[i, j])
            clusters = np.empty(count, dtype=np.int64)
            for j in range(count):
                clusters[j] = cluster_of_entry[pointers[i, j]]
            clusters.sort()
            # Runs of equal clusters; their order packs (most pointers first, then the smaller number) into one int.
            run_starts = np.empty(count, dtype=np.int64)
            runs = 0
            for j in range(count):
                if clusters[j] >= 0 and (j == 0 or clusters[j] != clusters[j - 1]):
                    run_starts[runs] = j
                    runs += 1
            rank = np.empty(runs, dtype=np.int64)
            for r in range(runs):
                end = run_starts[r + 1] if r + 1 < runs else count
                rank[r] = -(end - run_starts[r]) * 2**40 + r
            rank.sort()
            for r in range(runs):
                cluster = clusters[run_starts[rank[r] & (2**40 - 1)]]
                for m in range(member_starts[cluster], member_starts[cluster + 1]):
                    if count == max_knns:
                        break
                    if len(kept) and not (kept[members[m] >> 3] >> (members[m] & 7)) & 1:
                        continue
                    if not merge or _add(seen, members[m]):
                        pointers[i, count] = members[m]
                        count += 1
        counts[i] = count
    return pointers, counts


@compiled
def gather(found_distances, found_entries, pointer_distances, pointers, pointer_counts, merge, distances, entries):
    """The step's candidates: what the search found, then the pointers.

    Parameters
    ----------
    found_distances, found_entries : float32 and int64 ``[n, k]``; entry -1 in empty slots.
    pointer_distances, pointers, pointer_counts : float32 and int64 ``[n, max_knns]``, and int64 ``[n]``.
    merge : whether each entry is taken once.
    distances, entries : float32 and int64 ``[n or more, width]``, written to.

    Returns
    -------
    int64 ``[n]``: how many there are.
    """
    n = len(pointers)
    counts = np.zeros(n, dtype=np.int64)
    for i in range(n):
        seen = _hash_set(found_entries.shape[1] + pointer_counts[i] if merge else 1)
        count = 0
        for j in range(found_entries.shape[1]):
            if found_entries[i, j] >= 0 and (not merge or _add(seen, found_entries[i, j])):
                entries[i, count], distances[i, count] = found_entries[i, j], found_distances[i, j]
                count += 1
        for j in range(pointer_counts[i]):
            if not merge or _add(seen, pointers[i, j]):
                entries[i, count], distances[i, count] = pointers[i, j], pointer_distances[i, j]
                count += 1
        counts[i] = count
    return counts


def advance(distances, entries, counts, values, document_starts, targets, temperature, survivors, survivor_counts):
    """log p_kNN of the targets, and the survivors: candidates with the target as value and a successor.

    Parameters
    ----------
    distances, entries, counts : float32 and int64 ``[n, width]``, and int64 ``[n]``: the candidates.
    values, document_starts : the datastore's.
    targets : int64 ``[n]``; -1 where the token is not known yet.
    survivors, survivor_counts : int64 ``[n or more, width]`` and ``[n or more]``, written to, nearest first.

    Returns
    -------
    float64 ``[n]``; minus infinity where no candidate has the target as its value, NaN where there is no candidate.
    """
    weights = _exponents(distances, counts, temperature)
    np.exp(weights, out=weights)  # numpy's is several times as fast as a compiled loop's
    return _advance(weights, distances, entries, counts, values, document_starts, targets, survivors, survivor_counts)


@compiled
def _exponents(distances, counts, temperature):
    """(least distance - distance) / temperature, float64 ``[n, most candidates]``; minus infinity beyond the counts."""
    exponents = np.full((len(distances), counts.max()), -math.inf)
    for i in range(len(distances)):
        if counts[i]:
            nearest = distances[i, : counts[i]].min()
            for j in range(counts[i]):
                exponents[i, j] = (nearest - distances[i, j]) / temperature
    return exponents


@compiled
def _advance(weights, distances, entries, counts, values, document_starts, targets, survivors, survivor_counts):
    """As ``advance``, with the candidates' weights ``[n, most candidates]``."""
    n = len(distances)
    log_p = np.full(n, -math.inf)
    for i in range(n):
        count = counts[i]
        survivor_counts[i] = 0
        if count == 0:
            log_p[i] = math.nan
            continue
        total, mass = 0.0, 0.0
        survived = np.empty(count, dtype=np.int64)
        number = 0
        for j in range(count):
            weight = weights[i, j]
            total += weight
            entry = entries[i, j]
            if values[entry] == targets[i]:
                mass += weight
                at = np.searchsorted(document_starts, entry + 1)
                begins_document = at < len(document_starts) and document_starts[at] == entry + 1
                if entry + 1 < len(values) and not begins_document:
                    survived[number] = j
                    number += 1
        if mass > 0:
            log_p[i] = math.log(mass / total)
        survived = survived[:number]
        order = np.argsort(distances[i][survived], kind="mergesort")
        for j in range(number):
            survivors[i, j] = entries[i, survived[order[j]]]
        survivor_counts[i] = number
    return log_p


@compiled
def heaviest(distances, entries, counts, temperature, chosen_entries, chosen_weights):
    """Which candidates weigh most, nearest first, and their shares of p_kNN.

    Parameters
    ----------
    distances, entries, counts : as for ``advance``.
    chosen_entries, chosen_weights : int64 and float32 ``[n, most]``, written to; -1 and 0 where there are fewer.

    Returns
    -------
    float32 ``[n]``: the least distances; infinity where there is no candidate.
    """
    n, most = chosen_entries.shape
    nearest = np.full(n, np.inf, dtype=np.float32)
    for i in range(n):
        chosen_entries[i] = -1
        chosen_weights[i] = 0.0
        if counts[i] == 0:
            continue
        nearest[i] = distances[i, : counts[i]].min()
        total, filled = 0.0, 0
        kept = np.empty(most, dtype=np.float32)
        for j in range(counts[i]):
            distance = distances[i, j]
            exponent = (np.float64(nearest[i]) - np.float64(distance)) / temperature
            if exponent > -745.0:
                total += math.exp(exponent)
            if filled == most and not distance < kept[most - 1]:
                continue
            place = min(filled, most - 1)
            while place > 0 and distance < kept[place - 1]:
                kept[place], chosen_entries[i, place] = kept[place - 1], chosen_entries[i, place - 1]
                place -= 1
            kept[place], chosen_entries[i, place] = distance, entries[i, j]
            filled = min(filled + 1, most)
        for place in range(filled):
            chosen_weights[i, place] = (
                math.exp((np.float64(nearest[i]) - np.float64(kept[place])) / temperature) / total
            )
    return nearest
