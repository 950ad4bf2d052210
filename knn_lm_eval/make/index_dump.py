"""Dumping straight into an index: the LM's keys are added to it part by part, and none is kept.

A sample of the text's keys is read first, and the index trained on it. Then the entries come in segments: the keys of
one are written to a file, chunk by chunk, which is deleted when they are in the index's segment. In the end the
segments become the index. The disk so has the index, and the keys of the segments that are being worked on.

Each segment is one process's. What is done with its keys while they are there, and not in memory, is all that can ever
be done with them: their search for the exact neighbours of held-out queries, by which the index is measured.
"""

from __future__ import annotations

SEGMENT_ENTRIES = 2**20
SEGMENTS_EACH = 8  # for each of several processes, at least, so that they end at about the same time
