"""What a built encoder does, found by running it on a small input rather than by looking at names.

Weights, statistics and random numbers stay as they were.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shards.storage.errors import BadInput

ALIKE = 1e-5
"""Relative size below which the difference of two gradients is rounding."""
UNSEEN = 0.01
"""Share of a photo's side that a model may leave unseen."""
Forward = Callable[[], torch.Tensor]


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """`module` in training or eval mode; modes, statistics and torch's random state are put back.

    Eval mode moves no statistics, and its graph may still be differentiated afterwards.
    """
    modes = [(one, one.training) for one in module.modules()]
    buffers = [(one, one.clone()) for one in module.buffers() if training]
    module.train(training)
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        for one, mode in modes:
            one.training = mode
        with torch.no_grad():
            for one, before in buffers:
                one.copy_(before)


@contextmanager
def stirred(module: nn.Module) -> Iterator[None]:
    """`module` with other norms, biases and layer scales: what is found is true of any weights.

    As they begin, at 0 or at one millionth, whole layers add nothing to the vector. They get a
    tenth more: biases much above what random layers make of an item would hide the item, and all
    that comes after them would look linear.
    """
    vectors = [(one, one.detach().clone()) for one in module.parameters() if one.ndim == 1]
    draw = torch.Generator().manual_seed(1)
    try:
        for one, _ in vectors:
            size = torch.rand(one.shape, generator=draw) + 0.5
            sign = torch.randint(2, one.shape, generator=draw) * 2 - 1
            # Through .data, or the graph would take the change for one that spoils it.
            one.data.copy_(size * (one.data.abs() + 0.1) * torch.where(one.data > 0, 1, sign))
        yield
    finally:
        for one, before in vectors:
            one.data.copy_(before)


@torch.enable_grad()
def freeze_unused(
    module: nn.Module, pooled: torch.Tensor, *inputs: torch.Tensor
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Freeze what `pooled` (n, D) does not depend on: DDP would wait for its gradient for ever.

    Such as a pooler or a classifier. Returns the gradients of all other weights by name, and those
    of the `inputs`.
    """
    named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    found = torch.autograd.grad(
        (pooled * _direction(pooled)).sum(), [*inputs, *(weight for _, weight in named)],
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    gradients = {}
    for (name, weight), gradient in zip(named, found[len(inputs) :], strict=True):
        weight.requires_grad_(gradient is not None)
        if gradient is not None:
            gradients[name] = gradient
    return gradients, found[: len(inputs)]


@torch.enable_grad()
def freeze_shifts(
    module: nn.Module, pooled: torch.Tensor, gradients: dict[str, torch.Tensor]
) -> None:
    """Freeze each bias that shifts all items `pooled` (n, D), n > 1, by one same vector.

    The mean that the neck takes cancels it. Its gradient is 0 but for rounding, which AdamW turns
    into steps of full size that differ with the number of ranks. `gradients` of freeze_unused.
    """
    named = module.named_parameters()
    biases = {name: one for name, one in named if name in gradients and one.ndim == 1}
    if not biases:
        return
    # Directions that add up to 0 over the items see nothing of what is equal for all of them.
    centred = _direction(pooled) - _direction(pooled).mean(0)
    left = torch.autograd.grad((pooled * centred).sum(), list(biases.values()))
    for (name, bias), rest in zip(biases.items(), left, strict=True):
        complete = gradients[name].norm()
        bias.requires_grad_(not (complete > 0 and rest.norm() <= ALIKE * complete))


def _direction(pooled: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(pooled.shape, generator=draw).to(pooled)


def check_photo_is_seen(gradient: torch.Tensor, what: str) -> None:
    """BadInput when pixels at the border have no effect; `gradient` (n, 3, S, S) by pixel."""
    side = gradient.shape[-1]
    for dim in (2, 3):
        others = [one for one in range(4) if one != dim]
        lines = gradient.abs().amax(others).nonzero().flatten()
        seen = int(lines[-1] - lines[0]) + 1 if len(lines) else 0
        if side - seen > UNSEEN * side:
            raise BadInput(
                f"{what}: of photos of {side} pixels the model sees {seen} and leaves out the "
                f"border (they are no multiple of its patches); set encoder.image_size to {seen}, "
                "or to a larger multiple"
            )


def is_random(module: nn.Module, forward: Forward) -> bool:
    """Whether two passes of `forward` in training mode differ, as by dropout."""
    with in_mode(module, True), torch.no_grad():
        first, second = forward(), forward()
    return not torch.equal(first, second)


def layers_from_below(backbone: nn.Module, forward: Forward) -> dict[str, int]:
    """The layer of every weight by its name: 0 below the first block, then the blocks in order.

    The blocks are the longest list of modules; what runs after the first of them has begun belongs
    to the last. So it does not matter what a model calls its embeddings.
    """
    lists = {
        name: module for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }  # fmt: skip
    inside = {name for name in lists if any(name.startswith(f"{one}.") for one in lists)}
    outer = {name: module for name, module in lists.items() if name not in inside}
    if not outer:
        return {name: 0 for name, _ in backbone.named_parameters()}
    size = {name: sum(w.numel() for w in module.parameters()) for name, module in outer.items()}
    blocks = len(outer[max(size, key=lambda name: size[name])])
    layers = {
        id(weight): number + 1
        for module in outer.values() if len(module) == blocks
        for number, block in enumerate(module)
        for weight in block.parameters()
    }  # fmt: skip
    # In the order of execution, all that is entered after the first block is above the blocks.
    above: set[int] = set()

    def enter(module: nn.Module, _: object) -> None:
        own = [id(weight) for weight in module.parameters(recurse=False)]
        if any(layers.get(one, 0) > 0 for one in own):
            above.add(0)
        elif above:
            above.update(one for one in own if one not in layers)
        else:
            layers.update(dict.fromkeys(own, 0))

    hooks = [module.register_forward_pre_hook(enter) for module in backbone.modules()]
    try:
        with in_mode(backbone, False), torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: blocks if id(weight) in above else layers.get(id(weight), 0)
        for name, weight in backbone.named_parameters()
    }
