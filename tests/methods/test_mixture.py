"""The mixture against the paper's formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.oracle import mixture_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods.mixture import (
    greedy_tokens,
    knn_log_prob,
    knn_log_probs,
    mix,
    mixed_log_probs,
    neighbour_log_weights,
)

VOCABULARY = 7


@st.composite
def neighbourhoods(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Distances (of very different sizes, with ties) and values of k neighbours for n positions."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    scale = draw(st.sampled_from([0.1, 1.0, 1e3, 1e5]))
    distances = draw(
        st.lists(st.lists(st.integers(0, 40), min_size=k, max_size=k), min_size=n, max_size=n).map(np.array)
    )
    values = draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=k, max_size=k), min_size=n, max_size=n))
    offset = draw(st.sampled_from([0.0, 5e4]))  # large norms: all neighbours are far, in absolute terms
    temperature = draw(st.sampled_from([0.5, 1.0, 13.0])) * scale
    return distances * scale + offset, np.array(values), temperature, draw(st.sampled_from([0.1, 0.25, 0.9]))


@settings(max_examples=150, deadline=None)
@given(neighbourhoods())
def test_target_probability_equals_the_paper_formula(case) -> None:
    distances, values, temperature, lmbda = case
    distances32 = torch.tensor(distances, dtype=torch.float32)
    log_weights = neighbour_log_weights(distances32, temperature, None)
    for target in range(VOCABULARY):
        targets = torch.full((len(values),), target)
        p = knn_log_prob(log_weights, torch.tensor(values), targets).exp().double().numpy()
        for row in range(len(values)):
            expected = mixture_weights(distances32[row].double().numpy(), values[row], temperature, VOCABULARY)
            assert p[row] == pytest.approx(expected[target], rel=1e-5, abs=1e-30)


@settings(max_examples=150, deadline=None)
@given(neighbourhoods(), st.integers(0, 2**31))
def test_greedy_token_is_the_argmax_of_the_dense_mixture(case, seed) -> None:
    distances, values, temperature, lmbda = case
    lm_log_probs = torch.randn(len(values), VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    log_weights = neighbour_log_weights(torch.tensor(distances, dtype=torch.float32), temperature, None)
    greedy = greedy_tokens(lm_log_probs, log_weights, torch.tensor(values), lmbda)
    for row in range(len(values)):
        p_knn = mixture_weights(distances[row], values[row], temperature, VOCABULARY)
        p = (1 - lmbda) * lm_log_probs[row].double().exp().numpy() + lmbda * p_knn
        assert p[greedy[row]] == pytest.approx(p.max(), rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(neighbourhoods(), st.integers(0, 2**31), st.booleans())
def test_the_whole_distribution_equals_the_paper_formula(case, seed, knn_alone) -> None:
    distances, values, temperature, lmbda = case
    lmbda = 1.0 if knn_alone else lmbda
    lm_log_probs = torch.randn(len(values), VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    # An empty slot at the end of each row, which says nothing about token 0.
    padded = torch.nn.functional.pad(torch.tensor(distances, dtype=torch.float32), (0, 1), value=float("inf"))
    log_weights = neighbour_log_weights(padded, temperature, None)
    actual = mixed_log_probs(lm_log_probs, log_weights, torch.nn.functional.pad(torch.tensor(values), (0, 1)), lmbda)
    for row in range(len(values)):
        p_knn = mixture_weights(padded[row, :-1].double().numpy(), values[row], temperature, VOCABULARY)
        p = (1 - lmbda) * lm_log_probs[row].double().exp().numpy() + lmbda * p_knn
        assert actual[row].exp().tolist() == pytest.approx(p.tolist(), rel=1e-5, abs=1e-30)


def test_greedy_token_takes_the_smallest_id_of_a_tie() -> None:
    lm_log_probs = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]))
    log_weights = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    values = torch.tensor([[3, 1], [2, 0]])
    assert greedy_tokens(lm_log_probs, log_weights, values, 0.5).tolist() == [1, 0]
    assert greedy_tokens(lm_log_probs, log_weights, values, 0.0).tolist() == [0, 1]


def test_empty_slots_have_no_weight() -> None:
    distances = torch.tensor([[1.0, float("inf")], [float("inf"), float("inf")]])
    log_weights = neighbour_log_weights(distances, 1.0, None)
    assert log_weights[0].tolist() == [0.0, -float("inf")]
    p = knn_log_prob(log_weights, torch.tensor([[2, 0], [0, 0]]), torch.tensor([2, 0])).exp()
    assert p[0] == 1.0 and p[1].isnan()  # without a neighbour there is no p_kNN


@pytest.mark.parametrize("lmbda", [0.25, 1.0, torch.tensor([0.25, 1.0])], ids=str)
def test_without_a_neighbour_the_mixture_is_the_lm(lmbda) -> None:
    lm_log_probs = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    lm_log_probs[:, 0] = -5.0  # the value that empty slots have is not the likeliest token
    log_weights = neighbour_log_weights(torch.full((2, 3), float("inf")), 1.0, None)
    values = torch.zeros(2, 3, dtype=torch.int32)
    targets = torch.tensor([0, 4])
    of_targets = lm_log_probs.gather(-1, targets[:, None])[:, 0]
    assert mix(of_targets, knn_log_prob(log_weights, values, targets), lmbda).tolist() == of_targets.tolist()
    assert mixed_log_probs(lm_log_probs, log_weights, values, lmbda).tolist() == lm_log_probs.tolist()
    assert greedy_tokens(lm_log_probs, log_weights, values, lmbda).tolist() == lm_log_probs.argmax(-1).tolist()
    distances = torch.full((2, 3), float("inf"))
    assert knn_log_probs(distances, values, None, targets, (0.5, 2.0), (1, 3)).isnan().all()


def test_mixture_is_exact_at_its_ends() -> None:
    lm, knn = torch.tensor([-1.0, -2.0]), torch.tensor([-float("inf"), -0.5])
    assert mix(lm, knn, 0).tolist() == lm.tolist()
    assert mix(lm, knn, 1).tolist() == knn.tolist()
    assert mix(lm, knn, 0.5)[0].item() == pytest.approx(-1.0 + np.log(0.5))


@settings(max_examples=150, deadline=None)
@given(neighbourhoods(), st.data())
def test_a_neighbour_of_count_w_weighs_as_w_copies(case, data) -> None:
    distances, values, temperature, _ = case
    distances = torch.tensor(distances, dtype=torch.float32)
    k = distances.shape[1]
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=k, max_size=k)))
    copies = torch.arange(k).repeat_interleave(counts)
    weighted = neighbour_log_weights(distances, temperature, counts.expand_as(distances))
    copied = neighbour_log_weights(distances[:, copies], temperature, None)
    for target in range(VOCABULARY):
        targets = torch.full((len(distances),), target)
        actual = knn_log_prob(weighted, torch.tensor(values), targets)
        expected = knn_log_prob(copied, torch.tensor(values)[:, copies], targets)
        torch.testing.assert_close(actual.exp(), expected.exp(), rtol=1e-5, atol=1e-6)
