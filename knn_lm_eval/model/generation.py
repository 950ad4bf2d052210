"""A transformers model whose own ``forward`` and ``generate`` are kNN-LM or RetoMaton, for as long as one likes.

    with retrieval_augmented(model, datastore="stores/x"):
        model.generate(**tokenizer("Once", return_tensors="pt"))

``forward`` is all that is replaced: it returns the mixture's log-probabilities where the model returns logits, so
greedy search, sampling, beams, KV caches and stop sequences are transformers' own.

RetoMaton's state belongs to a sequence of tokens. ``generate`` reorders sequences between steps (beams) and hands
``forward`` the newest token alone, but it prepares each step's inputs from the whole sequences. These are noted
there, and a sequence goes on from the candidates of the one that it extends by a token.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.reading import LOGITS_BYTES
from knn_lm_eval.methods.automaton import Automaton, Walk, padded_neighbours
from knn_lm_eval.methods.mixture import mixed_log_probs
from knn_lm_eval.model.accounting import Work
from knn_lm_eval.model.generation_steps import GenerationSteps
from knn_lm_eval.model.neighbours import FindNeighbours, Neighbours
from knn_lm_eval.model.ngram_mixture import Context, NgramReader
from knn_lm_eval.model.opening import Augmentation, open_augmentation
from knn_lm_eval.model.scoring import NEIGHBOURS_PER_BLOCK
from knn_lm_eval.model.search_cost import tell_costly_search
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.system.timing import StageTimer


def retrieval_augmented(
    model: nn.Module, datastore: str | os.PathLike | None = None, *, tokenizer: Any = None, **settings: Any
) -> MixedForward:
    """A context manager inside which a transformers causal LM is a kNN-LM or RetoMaton.

    Parameters
    ----------
    model : a transformers causal LM, or a PEFT model around one, in evaluation mode.
    datastore : the datastore's folder; None takes the environment variable ``KNN_LM_EVAL_DATASTORE``.
    tokenizer : where given, it is checked to be the datastore's.
    **settings : the fields of ``RetrievalSettings`` that are not about lm-eval's windows.

    Returns
    -------
    The context manager; it may be entered again and again. Outside it the model is as it was.

    Raises
    ------
    UserError
        Where a setting is out of range, or the datastore, the index and the model do not belong together.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder model; retrieval is for decoder-only LMs.")
    given = RetrievalSettings(datastore=datastore, **settings)
    if given.context_len != 1 or given.carry_state:
        raise UserError("context_len and carry_state are for the windows of lm-eval's requests; leave them out.")
    opened = open_augmentation(given)
    _check_generates(opened)
    lm = opened.language_model(model, tokenizer)
    tell_costly_search(opened, lm)
    return MixedForward(lm, opened)


class MixedForward:
    """The context manager behind ``retrieval_augmented``.

    Inside, ``forward`` returns float32 log-probabilities of the mixture (in ``generate`` plus a constant per position,
    so that they are on the level of the LM's logits), over the whole vocabulary, for each
    position for which the model returns logits; padding (by a 2-D attention mask) keeps the LM's alone. A loss
    (``labels``) is the mixture's. No gradients.

    RetoMaton walks each row of a plain forward pass over its positions, anew in each call. In ``generate`` a walk
    begins with the first token that is generated and follows its sequence to the end of the call.

    Parameters
    ----------
    model : the LM.
    augmentation : what is mixed into it.

    Attributes
    ----------
    work : what was done: positions that were mixed (``positions_generated``), those of them at which the weight
        wanted no search, and seconds by stage; searches and walks count theirs in ``augmentation``.
    """

    def __init__(self, model: LanguageModel, augmentation: Augmentation) -> None:
        self.model, self.augmentation = model, augmentation
        self._positions, self._skipped = 0, 0
        self._timed = StageTimer(("forward", "mixture"), model.device)
        self._ngrams = NgramReader(augmentation.ngrams)
        self._inside: ExitStack | None = None
        # In ``generate``: the sequences of the step at hand, and the candidates after each sequence of the last one.
        self._steps = GenerationSteps()
        self._candidates: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def work(self) -> Work:
        counts = {
            "positions_generated": self._positions,
            "rows": self._positions,
            "rows_skipped": self._skipped,
        }
        return Work(counts | self._ngrams.counts, self._timed.seconds | self._ngrams.seconds)

    def __enter__(self) -> MixedForward:
        if self._inside is not None:
            raise RuntimeError("This model is inside its retrieval_augmented block already.")
        _check_generates(self.augmentation)
        inner = self.model.inner
        with ExitStack() as stack:
            stack.enter_context(_replaced(inner, "forward", self._mixed(inner.forward)))
            if hasattr(inner, "generate"):
                stack.enter_context(_replaced(inner, "generate", self._noting_sequences(inner.generate)))
            self._inside = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._inside is not None
        self._inside.close()
        self._inside = None

    def _mixed(self, forward: Callable) -> Callable:
        """``forward`` with the mixture in place of its logits."""
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def mixed_forward(*args: Any, **kwargs: Any) -> Any:
            captured: dict[str, Tensor] = {}
            with self._timed("forward"), self.model.capture_keys(captured):
                output = forward(*args, **kwargs)
            with torch.no_grad():
                return self._with_mixture(output, captured["key"], signature.bind_partial(*args).arguments | kwargs)

        return mixed_forward

    def _noting_sequences(self, generate: Callable) -> Callable:
        """``generate`` that tells ``forward`` the sequences whose next token it predicts."""
        inner = self.model.inner

        @functools.wraps(generate)
        def noting_generate(*args: Any, **kwargs: Any) -> Any:
            prepare = inner.prepare_inputs_for_generation

            @functools.wraps(prepare)
            def noting_prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
                # Token ids alone do not tell sequences apart that begin with embeddings.
                known = input_ids if kwargs.get("inputs_embeds") is None else None
                self._steps.note(known, kwargs.get("past_key_values"))
                return prepare(input_ids, *args, **kwargs)

            if "generation_config" not in kwargs:
                kwargs.setdefault("disable_compile", True)  # a search cannot be compiled
            try:
                with _replaced(inner, "prepare_inputs_for_generation", noting_prepare):
                    return generate(*args, **kwargs)
            finally:
                self._steps, self._candidates = GenerationSteps(), {}

        return noting_generate

    def _with_mixture(self, output: Any, keys: Tensor, arguments: dict[str, Any]) -> Any:
        """The model's output with the mixture's log-probabilities, and the loss of those."""
        labels = arguments.get("labels")
        place = 0 if labels is None else 1  # in a tuple the loss comes first
        logits = output[place] if isinstance(output, tuple) else output.logits
        keys = keys.reshape(len(logits), -1, keys.shape[-1])  # some layers (OPT's) flatten batch and time
        length = keys.shape[1]

        in_generate, sequences = self._steps.is_noted, self._steps.take()
        generating = sequences is not None
        # What generate does not ask for it does not look at: all positions of models that cannot keep a few.
        keep = arguments.get("logits_to_keep", 0)
        kept = keep.cpu() if isinstance(keep, Tensor) else torch.arange(length)[-(keep or int(generating)) :]
        if logits.shape[1] == length:
            logits = logits[:, kept]
        mask = arguments.get("attention_mask")
        real = torch.ones(logits.shape[:2], dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -length:][:, kept].bool().cpu()
        if sequences is None:
            sequences = arguments.get("input_ids")
        from_end = kept.numpy() - length
        log_probs = self._mix(logits, keys[:, kept], real, from_end, sequences, generating)
        self._mix_ngrams_in(log_probs, real, from_end, sequences, mask)
        if in_generate:
            # Processors of logits, such as the repetition penalty, expect the level that the LM's logits have.
            log_probs += logits.float().logsumexp(dim=-1, keepdim=True)

        loss = None
        if labels is not None:
            loss = self.model.inner.loss_function(
                logits=log_probs,
                labels=labels,
                vocab_size=log_probs.shape[-1],
                num_items_in_batch=arguments.get("num_items_in_batch"),
            )
        if isinstance(output, tuple):
            return (*([] if loss is None else [loss]), log_probs, *output[place + 1 :])
        output.logits = log_probs
        if loss is not None:
            output.loss = loss
        return output

    def _mix(
        self,
        logits: Tensor,
        keys: Tensor,
        real: Tensor,
        from_end: np.ndarray,
        sequences: Tensor | None,
        generating: bool,
    ) -> Tensor:
        """Log-probabilities ``[batch, kept, vocabulary]`` of LM and neighbours where ``real``, of the LM elsewhere.

        ``from_end`` says where in its sequence a kept position is: -1 is the last.
        """
        with self._timed("mixture"):
            log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        rows, columns = real.nonzero(as_tuple=True)
        self._positions += len(rows)
        mixture, automaton = self.augmentation.mixture, self.augmentation.automaton
        if mixture.weight.threshold is not None and len(rows):
            wanted = self._wanted(log_probs, rows, columns)
            rows, columns = rows[wanted], columns[wanted]
        if mixture.is_lm_alone or not len(rows):
            return log_probs
        queries = self.model.project(keys[rows, columns])  # [positions, dimension]
        find: FindNeighbours
        if automaton is None:

            def find(some: Tensor) -> Neighbours:
                found = self.augmentation.retriever.search(queries[some])
                return Neighbours(found.distances, found.values, found.counts)

        else:
            known = np.zeros((len(logits), 0), np.int64) if sequences is None else sequences.cpu().numpy()
            steps = self._walk(automaton, queries, rows.numpy(), from_end[columns.numpy()], known, generating)

            def find(some: Tensor) -> Neighbours:
                distances, values, _ = padded_neighbours([steps[i] for i in some.tolist()], automaton.values)
                return Neighbours(distances, values, None)

        self._mix_in(log_probs, rows, columns, find)
        return log_probs

    def _wanted(self, log_probs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """At which of these positions the weight wants a search: bool ``[positions]``."""
        weight, wanted = self.augmentation.mixture.weight, []
        chunk = _rows_of_table(log_probs.shape[-1])
        for place in zip(rows.split(chunk), columns.split(chunk), strict=True):
            of_piece = weight.wants_search(weight.lm_features(log_probs[place]))
            assert of_piece is not None, "asked only of a weight with a threshold"
            wanted.append(of_piece.cpu())
        self._skipped += sum(int((~piece).sum()) for piece in wanted)
        return torch.cat(wanted)

    def _mix_in(self, log_probs: Tensor, rows: Tensor, columns: Tensor, find: FindNeighbours) -> None:
        """Put the mixture in the place of the LM's distribution at these positions of ``[batch, kept, vocabulary]``."""
        mixture, chunk = self.augmentation.mixture, _rows_of_table(log_probs.shape[-1])
        block = max(1, NEIGHBOURS_PER_BLOCK // self.augmentation.retriever.k)
        for start in range(0, len(rows), block):
            stop = min(start + block, len(rows))
            found = find(torch.arange(start, stop))
            with self._timed("mixture"):
                of_block = mixture.weigh(found.distances, found.values, found.counts, log_probs.device)  # [block, k]
                for at in range(start, stop, chunk):
                    here = slice(at, min(at + chunk, stop))
                    place = rows[here], columns[here]
                    table = log_probs[place]  # [chunk, vocabulary]
                    neighbours = of_block.of_rows(slice(at - start, at - start + chunk))
                    lmbda = mixture.lmbda(mixture.weight.lm_features(table), neighbours)
                    log_probs[place] = mixed_log_probs(table, neighbours.log_weights, neighbours.values, lmbda)

    def _mix_ngrams_in(
        self, log_probs: Tensor, real: Tensor, from_end: np.ndarray, sequences: Tensor | None, mask: Any
    ) -> None:
        """Mix the n-gram LM, if there is one, into ``[batch, kept, vocabulary]`` where ``real``; as for ``_mix``."""
        if self._ngrams.mixture is None:
            return
        if sequences is None:
            raise UserError("n-grams are looked up by token ids, and embeddings were given: leave ngram_lmbda out.")
        known = sequences.cpu().numpy()
        padding = np.zeros(len(known), dtype=np.int64)
        if isinstance(mask, Tensor) and mask.shape == sequences.shape:
            padding = mask.bool().int().argmax(dim=-1).cpu().numpy()  # on the left
        for row, tokens in enumerate(known):
            (columns,) = real[row].nonzero(as_tuple=True)
            for column in columns.tolist():
                context = tokens[padding[row] : len(tokens) + from_end[column] + 1]
                rows = self._ngrams.of_contexts([Context(context, 1)])
                rows.mix_into(log_probs[row, column : column + 1], 0)

    def _walk(
        self,
        automaton: Automaton,
        queries: Tensor,
        rows: np.ndarray,
        from_end: np.ndarray,
        sequences: np.ndarray,
        generating: bool,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The neighbours (distances, entries) at each position, walking along stretches of adjacent ones."""
        known = sequences.shape[1]
        positions = from_end + known
        breaks = np.flatnonzero((np.diff(rows) != 0) | (np.diff(positions) != 1)) + 1
        vectors = queries.float().cpu().numpy()
        walks, ends = [], []
        for stretch in np.split(np.arange(len(rows)), breaks):
            tokens, first, end = sequences[rows[stretch[0]]], positions[stretch[0]], positions[stretch[-1]] + 1
            # The token after the last position is not known yet, and none is where embeddings were given.
            targets = np.full(len(stretch), -1)
            if known:
                targets[: len(tokens[first + 1 : end + 1])] = tokens[first + 1 : end + 1]
            walk = Walk(vectors[stretch], targets)
            before = self._candidates.get(tokens[:first].tobytes())
            if generating and before and not self._steps.is_prompt:
                walk.survivors = automaton.survivors(*before, tokens[first])
            walks.append(walk)
            ends.append((tokens, first))
        automaton.walk(walks, keep_neighbours=True)
        if generating:
            self._candidates = {
                tokens[: first + step + 1].tobytes(): neighbours
                for walk, (tokens, first) in zip(walks, ends, strict=True)
                for step, neighbours in enumerate(walk.neighbours)
            }
        return [neighbours for walk in walks for neighbours in walk.neighbours]


def _check_generates(augmentation: Augmentation) -> None:
    if augmentation.exclusion is not None:
        raise UserError(
            "exclude_overlap is for texts that are scored, and here there is none to compare the datastore with: leave "
            "it out where text is generated."
        )


def _rows_of_table(vocabulary: int) -> int:
    """How many rows over the vocabulary are looked at together."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, ``thing`` has ``value`` as its own attribute ``name``."""
    own = thing.__dict__.get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)
