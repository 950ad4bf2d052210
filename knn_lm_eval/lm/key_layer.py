"""Finding the module whose input or output is the key: the last layer of a causal LM, and its feed-forward block.

No architecture is known by name. The model reads a few tokens; the feed-forward block is the last one called in
the last layer that reads each position by itself, whatever it is called, be it dense or a mixture of experts,
after attention or beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

from torch import Tensor, nn

from knn_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

# The exceptions: what the block is called in layers without one that reads each position by itself. It is the
# mixer of state-space models, or, in RWKV, a feed-forward block that also looks at the position before.
MIXERS = ("mixer", "mamba", "feed_forward")
# An output that has moved by more than this part of itself depends on what was changed; rounding moves it less.
MOVED = 0.02
MAX_CANDIDATES = 40


def find_layer(model: Any, run: Callable[[], object]) -> str:
    """The name of the last layer: the last item of the list of layers.

    Parameters
    ----------
    model : the causal LM.
    run : reads some tokens, one row, with the model.

    Raises
    ------
    UserError
        Where no list of layers is used.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    last_items = {
        f"{name}.{len(module) - 1}": module[-1]
        for name, module in lists.items()
        if len(module) and not any(name.startswith(f"{other}.") for other in lists)
    }
    used: dict[str, int] = {}
    with ExitStack() as stack:
        for name, layer in last_items.items():

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                used.pop(name, None)  # what is called several times counts where it is called last
                used[name] = len(lists[name.rpartition(".")[0]])

            if _has_weights(layer):
                stack.callback(layer.register_forward_hook(note).remove)
        run()
    if not used:
        raise UserError(f"{type(model).__name__} has no list of layers. {_advice(model)}")
    # Other lists may be in use beside the layers: projections, shared blocks, prediction heads.
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    length = depth if depth in used.values() else max(used.values())
    return [name for name in used if used[name] == length][-1]


def find_feed_forward(model: Any, run: Callable[[], object]) -> str:
    """The name of the last layer's feed-forward block; parameters and errors as for ``find_layer``.

    Where the feed-forward part is no block of its own but bare linear maps, it is the first of them.
    """
    layer = find_layer(model, run)
    # In the order of their calls: those that read each position by itself, and others.
    blocks: list[str] = []
    maps: list[str] = []
    mixers: list[str] = []
    with ExitStack() as stack:
        for name, module in _children(model.get_submodule(layer)):

            def note(module: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
                given, made = hidden_state(args, kwargs), first_output(output)
                if given is None or given.dim() < 2 or not isinstance(made, Tensor):
                    return
                if made.numel() * given.shape[-1] != given.numel() * made.shape[-1]:
                    return  # not a vector per position
                is_bare = next(module.children(), None) is None
                if made.shape[-1] == given.shape[-1] and not is_bare:
                    found = blocks
                elif made.shape[-1] > given.shape[-1]:
                    found = maps
                else:
                    return
                if _reads_each_position_by_itself(module, args, kwargs, given, made):
                    found.append(name)
                elif name in MIXERS:
                    mixers.append(name)

            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run()
    if found := blocks or maps or mixers:
        return f"{layer}.{found[-1]}"
    raise UserError(
        f"{type(model).__name__}: no feed-forward block is found in its last layer {layer}. {_advice(model)}"
    )


def get_module(model: nn.Module, body: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` in ``model`` or in its body.

    Raises
    ------
    UserError
        Where there is none.
    """
    for root in (model, body):
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    raise UserError(f"{type(model).__name__} has no module {name!r}. {_advice(model)}")


def hidden_state(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden state that a module is called with: its first tensor of floating-point numbers."""
    tensors = (value for value in chain(args, kwargs.values()) if isinstance(value, Tensor))
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def first_output(output: Any) -> Any:
    """What a module gives beside other things (router logits, attention weights, caches)."""
    return output[0] if isinstance(output, tuple) else output


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in layer.named_children():
        items = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        yield from ((f"{name}.{item}".rstrip("."), module) for item, module in items if _has_weights(module))


def _reads_each_position_by_itself(module: nn.Module, args: tuple, kwargs: dict, given: Tensor, made: Tensor) -> bool:
    """Whether the last position's output stays as it is when all positions before it are changed.

    ``given`` is the hidden state among the module's arguments, ``made`` what it gave for them.
    """
    positions = next(axis for axis, length in enumerate(given.shape) if length > 1)
    changed = -given
    changed.select(positions, -1).copy_(given.select(positions, -1))

    def exchange(value: Any) -> Any:
        return changed if value is given else value

    def last_of(output: Tensor) -> Tensor:
        # Some blocks take [batch, time, width] and give [batch * time, width].
        return output.reshape(*given.shape[:-1], output.shape[-1]).select(positions, -1).float()

    try:
        again = module.forward(*map(exchange, args), **{name: exchange(value) for name, value in kwargs.items()})
    except Exception as error:  # any model code may fail in any way when called a second time
        logger.debug("%s cannot be called again: %r", type(module).__name__, error)
        return False
    before, after = last_of(made), last_of(first_output(again))
    return not (before - after).norm() > MOVED * before.norm()


def _has_weights(module: nn.Module) -> bool:
    return any(tensor.dim() > 1 for tensor in chain(module.parameters(), module.buffers()))


def _advice(model: nn.Module) -> str:
    """What to do where a module is not found or does not exist, with the names to choose from."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    earlier = tuple(f"{name}.{i}." for name in lists for i in range(len(model.get_submodule(name)) - 1))  # type: ignore[arg-type]
    names = [
        name
        for name, module in model.named_modules()
        if name and name not in lists and not f"{name}.".startswith(earlier) and _has_weights(module)
    ]
    shown = ", ".join(names[-MAX_CANDIDATES:])
    return f"Give key_module=NAME of the module whose input is to be the key; candidates are {shown}."
