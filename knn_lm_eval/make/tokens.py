"""From text to token ids, which are a datastore's values: ``values.npy`` and ``document_starts.npy``."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.text import Piece
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, VALUES
from knn_lm_eval.system.files import replace_file, write_npy_header

TOKENIZER_BATCH_CHARACTERS = 2**20
VALUE_DTYPE = np.int32


def write_values(lm: CausalHFLM, pieces: Iterable[Piece], output: Path, max_tokens: int | None) -> None:
    """Tokenize the text into ``values.npy`` and ``document_starts.npy``."""
    starts, count = array("q"), 0
    temporary = output / f"{VALUES}.tmp"
    with open(temporary, "wb") as file, tqdm(unit=" tokens", unit_scale=True, desc="Tokenizing") as bar:
        write_npy_header(file, VALUE_DTYPE, (0,))
        header_length = file.tell()
        for batch in _batch_pieces(pieces):
            for begins, ids in zip((begins for begins, _ in batch), _tokenize(lm, batch), strict=True):
                if max_tokens is not None:
                    ids = ids[: max_tokens - count]
                if ids:
                    if begins:
                        starts.append(count)
                    file.write(np.asarray(ids, dtype=VALUE_DTYPE).tobytes())
                    count += len(ids)
                    bar.update(len(ids))
            if max_tokens is not None and count >= max_tokens:
                break
        file.seek(0)
        write_npy_header(file, VALUE_DTYPE, (count,))
        assert file.tell() == header_length, "a .npy header's length changed with its shape"
    if count == 0:
        temporary.unlink()
        raise UserError("The text is empty: no tokens to make a datastore of.")
    with open(output / f"{DOCUMENT_STARTS}.tmp", "wb") as file:
        np.save(file, np.frombuffer(starts, dtype=np.int64))
    replace_file(output / f"{DOCUMENT_STARTS}.tmp", output / DOCUMENT_STARTS)
    replace_file(temporary, output / VALUES)


def _batch_pieces(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(lm: CausalHFLM, pieces: list[Piece]) -> list[list[int]]:
    """Token ids as HFLM.tok_encode gives them for scoring; special tokens only where a document begins."""
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    at_beginning = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    encoded: list[list[int]] = [[] for _ in pieces]
    for is_beginning, special in ((True, at_beginning), (False, {"add_special_tokens": False})):
        chosen = [i for i, (begins, text) in enumerate(pieces) if (begins and not text.startswith(bos)) == is_beginning]
        if chosen:
            ids = lm.tokenizer([pieces[i][1] for i in chosen], verbose=False, **special)["input_ids"]
            for i, piece_ids in zip(chosen, ids, strict=True):
                encoded[i] = piece_ids
    return encoded
