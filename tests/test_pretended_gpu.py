"""The pretended GPU refuses what a real one refuses, and gives the CPU's numbers for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pretended_gpu import PretendedGPU, PretendedTensor, pretended_gpu
from helpers.tiny_model import make_llama
from torch import Tensor


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretended_gpu() as gpu:
        yield gpu


def on_both(work: Callable[[Tensor, Tensor], Any]) -> tuple[Any, Any]:
    """What some work on a table and on rows of it gives on the GPU, where it must stay there, and on the CPU."""
    table, rows = torch.arange(12.0).reshape(3, 4) / 3 - 1, torch.tensor([2, 0])
    on_gpu = work(table.clone().to("cuda"), rows.to("cuda"))
    assert isinstance(on_gpu, PretendedTensor) and on_gpu.is_cuda and str(on_gpu.device) == "cuda:0"
    return on_gpu.cpu(), work(table, rows)


LEGAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number mixes": lambda x, rows: x + torch.tensor(1.5),
    "a number first": lambda x, rows: torch.tensor(1.5) * x,
    "a number is written": lambda x, rows: x.masked_fill_(x > 0, torch.tensor(7.0)),
    "indices": lambda x, rows: x[rows],
    "indices on the CPU": lambda x, rows: x[rows.cpu()],
    "a mask on the CPU as an index": lambda x, rows: x[(x > 0).cpu()],
    "numbers to indices on the CPU": lambda x, rows: x.index_put_((rows.cpu(),), torch.tensor(3.0)),
    "a slice is written": lambda x, rows: x.__setitem__(slice(0, 1), torch.zeros(1, 4, device=x.device)) or x,
    "a copy to a slice": lambda x, rows: x[1:].copy_(torch.ones(2, 4)),
    "a view shares its memory": lambda x, rows: (x[0].zero_(), x)[1],
    "out=": lambda x, rows: torch.log_softmax(x, -1, out=torch.empty(5, 4, device=x.device)[:3]),
    "gather": lambda x, rows: x.gather(0, rows[:, None]),
    "topk": lambda x, rows: x.topk(2).values,
    "sort": lambda x, rows: x.sort(dim=0, descending=True).indices,
    "nonzero": lambda x, rows: x.gt(0).nonzero(),
    "where": lambda x, rows: torch.where(x > 0, 1.0, x),
    "new tensors": lambda x, rows: x.new_full((2,), 3) + x.new_zeros(2) + torch.zeros_like(x)[0, :2],
    "made there": lambda x, rows: torch.arange(4, device=x.device) + torch.full((4,), 2, device=x.device),
    "from numbers": lambda x, rows: torch.tensor([1.0, 2.0], device=x.device),
    "another type": lambda x, rows: x.to(torch.float64).half().float(),
    "attention": lambda x, rows: torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", LEGAL)
def test_legal_code_gives_the_cpus_numbers(gpu: PretendedGPU, name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        found, expected = on_both(LEGAL[name])
        torch.testing.assert_close(found, expected)


MISTAKES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a mask left on the CPU": (lambda x: x.masked_fill(torch.ones(3, 4).bool(), 0.0), RuntimeError, "same device"),
    "numpy of a tensor there": (lambda x: x.numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "an array of a tensor there": (lambda x: np.asarray(x), TypeError, "can't convert cuda:0"),
    "an index on the CPU into gather": (lambda x: x.gather(0, torch.tensor([[0]])), RuntimeError, "same device"),
    "made without device=": (lambda x: x + torch.zeros(4), RuntimeError, "same device, but found .* cuda:0 and cpu"),
    "a tensor there as an index here": (lambda x: torch.arange(9)[x.long()], RuntimeError, "indices should be either"),
    "written to indices there": (lambda x: x.index_put_((torch.tensor([0]),), torch.ones(4)), RuntimeError, "device"),
    "a product": (lambda x: x[0] @ torch.ones(4), RuntimeError, "same device"),
    "a number that is written to": (lambda x: torch.tensor(1.0).add_(x[0, 0]), RuntimeError, "same device"),
    "joined": (lambda x: torch.cat([x, torch.ones(1, 4)]), RuntimeError, "same device"),
    "out= elsewhere": (lambda x: torch.exp(x, out=torch.empty(3, 4)), RuntimeError, "same device"),
    "a limit for searchsorted": (lambda x: torch.searchsorted(x[0], torch.tensor([1.0])), RuntimeError, "same device"),
    "scattered": (lambda x: x.scatter_add_(1, torch.zeros(3, 1).long(), x[:, :1]), RuntimeError, "same device"),
    "tokens on the CPU": (lambda x: torch.nn.functional.embedding(torch.tensor([1]), x), RuntimeError, "same device"),
    "no kernel": (lambda x: torch.histogram(x, 3), NotImplementedError, "'aten::histogram.bin_ct' .* 'CUDA'"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(gpu: PretendedGPU, name: str, inference: bool) -> None:
    mistake, error, words = MISTAKES[name]
    with torch.inference_mode(inference), pytest.raises(error, match=words):
        mistake(torch.arange(12.0, device="cuda").reshape(3, 4))


def test_what_needs_numbers_waits(gpu: PretendedGPU) -> None:
    x = torch.arange(3.0, device="cuda")
    y = (x * 2).cumsum(0)
    assert gpu.waits == []
    assert (float(y[1]), y.tolist(), bool((y > 5).any())) == (2.0, [0.0, 2.0, 6.0], True)
    assert y[y > 1].shape == (2,)
    waited = [name.removeprefix("aten::") for name in gpu.waits]
    assert waited == ["_local_scalar_dense", "copy to the CPU", "_local_scalar_dense", "index"]
    assert gpu.ran["aten::mul"] == 1


def test_a_copy_that_does_not_block_arrives_when_it_is_waited_for(gpu: PretendedGPU) -> None:
    x = torch.arange(3.0, device="cuda")
    copy = x.to("cpu", non_blocking=True)
    x.zero_()  # comes after the copy
    early, done = copy.clone(), torch.cuda.Event()
    done.record(torch.cuda.current_stream())
    late = x.to("cpu", non_blocking=True)
    assert early.isnan().all()
    done.synchronize()
    assert copy.tolist() == [0, 1, 2] and late.isnan().all()
    torch.cuda.synchronize()
    assert late.tolist() == [0, 0, 0]


def test_pinned_memory_stays_as_it_is_until_its_copy_is_done(gpu: PretendedGPU) -> None:
    buffer = torch.zeros(3, pin_memory=True)
    assert buffer.is_pinned() and torch.ones(2).pin_memory().is_pinned() and not torch.ones(2).is_pinned()
    for waits in (True, False):
        on_gpu = torch.empty(3, device="cuda").copy_(buffer, non_blocking=True)
        assert on_gpu.is_cuda
        if waits:
            torch.cuda.synchronize()
        buffer += 1
        if not waits:
            with pytest.raises(RuntimeError, match="pinned memory was written"):
                torch.cuda.synchronize()


def test_copies_in_another_stream_are_its_own(gpu: PretendedGPU) -> None:
    copies = torch.cuda.Stream()
    with torch.cuda.stream(copies):
        there = torch.arange(3, device="cuda").to("cpu", non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert there[0] == torch.iinfo(torch.int64).max
    copies.synchronize()
    assert there.tolist() == [0, 1, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_gives_the_cpus_numbers_and_refuses_tokens_on_the_cpu(gpu: PretendedGPU, inference: bool) -> None:
    model, tokens = make_llama(), torch.arange(1, 20)[None]
    with torch.inference_mode(inference), torch.no_grad():
        expected = model(tokens).logits
        model.to("cuda")
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        torch.testing.assert_close(model(tokens.to("cuda")).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="same device"):
            model(tokens)


def test_outside_all_is_as_it_was() -> None:
    with pretended_gpu():
        assert torch.cuda.is_available() and torch.zeros(1, device="cuda").is_cuda
    assert not torch.zeros(1).is_cuda
    if not torch.backends.cuda.is_built():
        assert not torch.cuda.is_available()
        with pytest.raises((AssertionError, NotImplementedError), match="CUDA"):
            torch.zeros(1, device="cuda")
