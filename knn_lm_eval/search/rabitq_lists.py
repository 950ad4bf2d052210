"""What the lists of RaBitQ indexes hold for an entry x of centroid c: the signs of x - c, and two factors.

They are read as faiss packs them: entry by entry (``RaBitQ``), or in blocks of 32 entries (``RaBitQfs``).
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

FACTOR_BYTES = 8  # of an entry, behind its signs


def signs_of_list(ivf: Any, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The signs uint8 ``[n, code bytes]``, factors float32 ``[n, 2]`` and numbers int64 of some entries of a list.

    Parameters
    ----------
    start, stop : which; the first is that of a block.
    """
    inverted: Any = ivf.invlists
    size, code_bytes = inverted.list_size(number), -(-ivf.d // 8)
    ids = faiss.rev_swig_ptr(inverted.get_ids(number), size)[start:stop]
    if isinstance(ivf, faiss.IndexIVFRaBitQ):
        raw = faiss.rev_swig_ptr(inverted.get_codes(number), size * ivf.code_size).reshape(size, -1)[start:stop]
        factors = np.ascontiguousarray(raw[:, code_bytes : code_bytes + FACTOR_BYTES]).view(np.float32)
        return np.ascontiguousarray(raw[:, :code_bytes]), factors, ids
    packed = ivf.M2 // 2 * 32
    stride = packed + 32 * FACTOR_BYTES
    raw = faiss.rev_swig_ptr(inverted.get_codes(number), -(-size // 32) * stride).reshape(-1, stride)
    raw = raw[start // 32 : -(-stop // 32)]  # [blocks, stride]
    blocks = len(raw)
    factors = np.ascontiguousarray(raw[:, packed:]).view(np.float32).reshape(-1, 2)[: stop - start]
    # Byte 2 v + w of 16 is half a byte of code each of entry 8 w + v, and of entry 16 + 8 w + v in its upper half; then
    # 16 bytes more hold the upper halves of the same bytes of code.
    pairs = raw[:, :packed].reshape(blocks, -1, 2, 8, 2).transpose(0, 4, 3, 1, 2).reshape(blocks, 16, -1, 2)
    first = (pairs[..., 0] & 15) | (pairs[..., 1] << 4)  # [blocks, 16, code bytes]
    second = (pairs[..., 0] >> 4) | (pairs[..., 1] & 0xF0)  # [blocks, 16, code bytes]
    flat = np.concatenate([first, second], axis=1).reshape(blocks * 32, -1)
    return np.ascontiguousarray(flat[: stop - start, :code_bytes]), factors, ids


def has_signs(ivf: Any) -> bool:
    """Whether an index has lists of RaBitQ with one bit, packed as ``signs_of_list`` reads them."""
    is_rabitq = isinstance(ivf, (faiss.IndexIVFRaBitQ, faiss.IndexIVFRaBitQFastScan))
    return is_rabitq and ivf.rabitq.nb_bits == 1 and _is_packed_as_known(ivf)


def _is_packed_as_known(ivf: Any) -> bool:
    """Whether the lists are packed as this faiss packs them, by a look at the longest."""
    if isinstance(ivf, faiss.IndexIVFRaBitQ):
        return ivf.code_size == -(-ivf.d // 8) + FACTOR_BYTES
    packer, inverted = ivf.get_CodePacker(), ivf.invlists
    if packer.nvec != 32 or packer.block_size != ivf.M2 // 2 * 32 + 32 * FACTOR_BYTES:
        return False
    sizes = [inverted.list_size(number) for number in range(ivf.nlist)]
    number = int(np.argmax(sizes))
    if not (size := sizes[number]):
        return True
    block_bytes, blocks = packer.block_size, -(-size // 32)
    packed = faiss.rev_swig_ptr(inverted.get_codes(number), blocks * block_bytes).reshape(blocks, block_bytes)
    for i in {0, size // 2, size - 1}:
        block = i // 32
        flat, factors, _ = signs_of_list(ivf, number, block * 32, i + 1)
        code = packer.unpack_1(packed[block : block + 1], i % 32)
        signs, of_entry = code[: flat.shape[1]], code[-FACTOR_BYTES:]
        if not np.array_equal(signs, flat[-1]) or of_entry.tobytes() != factors[-1].tobytes():
            return False
    return True
