"""How a launcher becomes an op: called straight by eager code, registered with torch for torch.compile. It computes nothing.

    @op("gelu_forward", fake=lambda x, bias: torch.empty(x.shape, dtype=x.dtype, device=x.device))
    def _gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor: ...

    _gelu_forward.differentiate(_setup, _backward_formula)

torch.compile takes an op of torch.library without a graph break, but the Python layers of such an op cost the host more than the launch itself, forward and backward
each, and several times what the device needs. Eager code needs none of them: there the launcher runs inside a plain torch.autograd.Function, and alone where nobody
wants a gradient. Who watches every op that torch runs (a torch_dispatch mode: fake tensors, tracing, counters) gets the registered one. Under torch.func and in forward mode
`auto` picks the plain twins, which have every derivative; of kernels asked for by name torch.func.vmap calls the registered ones, and the rest is an error.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import watched

Lengths = tuple[int | None, ...]
"""Of every argument: how many tensors, where it is a list of them, else None."""


def op(name: str, fake: Callable, overwrites: Sequence[str] = ()) -> Callable[[Callable], "Op"]:
    """Decorator: the launcher below is the op peftdebias::name.

    The launcher has a type for every argument; what it returns is new, never an input or a view of one. fake: the same arguments -> outputs of the same shapes,
    dtypes and strides, without values. overwrites: the arguments that it writes over; their versions are counted up, so that autograd knows.
    """
    return lambda launch: Op(name, launch, fake, overwrites)


def first_order(name: str) -> None:
    """To begin a backward with that cannot be differentiated itself: what it reads of the forward has no gradient there, so autograd alone would leave a term out and say
    nothing (torch's once_differentiable too, where autograd.grad is asked for some inputs alone). Raises RuntimeError under create_graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: expected a backward without create_graph, as its gradient has none of its own; the plain twin's has one (PEFTDEBIAS_KERNELS=torch, in float32)")


def backward_only(name: str) -> None:
    """To begin an op with: a launch reads no tangents, so autograd would take what it makes for a constant and say nothing. Raises NotImplementedError in forward mode."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name}: expected no forward mode (torch.func.jvp, torch.autograd.forward_ad), as its only derivatives are a backward's; the plain twin has both")


class Op:
    """A launcher and its registration. Arguments by place alone."""

    def __init__(self, name: str, launch: Callable, fake: Callable, overwrites: Sequence[str]):
        self.name, self.launch, self.function, self.__doc__ = name, launch, None, launch.__doc__
        self.registered = torch.library.custom_op(f"peftdebias::{name}", launch, mutates_args=overwrites)
        self.registered.register_fake(fake)
        parameters = inspect.signature(launch).parameters
        self.overwritten = [i for i, parameter in enumerate(parameters) if parameter in overwrites]
        self.lists = [parameter.annotation == list[Tensor] for parameter in parameters.values()]

    def __call__(self, *args):
        backward_only(self.name)
        if watched():
            return self.registered(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # Without a formula: whoever differentiates what comes out gets torch's error.
            return (self.function or self.registered)(*args)
        for i in self.overwritten:
            torch.autograd.graph.increment_version(args[i])
        return self.launch(*args)

    def differentiate(self, setup: Callable, formula: Callable, again: bool = False) -> None:
        """setup(ctx, inputs, output) keeps what formula(ctx, *gradients of the outputs) needs for every input's gradient, or None; a list of tensors has a list of them.

        Only the first output has a gradient: setup marks the others, and nobody fills zeros for theirs. The formula calls ops, as both ways of calling share it.
        again: autograd can differentiate the formula too. Else create_graph is an error at once (first_order).
        """
        def keep(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.lengths = lengths_of(inputs)
            setup(ctx, inputs, output)

        def gradients(ctx, *pulls):
            if pulls[0] is None:
                return _nested(itertools.repeat(None), ctx.lengths)
            if not again:
                first_order(self.name)
            return formula(ctx, *pulls)

        def forward(ctx, *args):  # and keeps: a Function with a setup_context has its signature read at every call
            output = self.launch(*args)
            keep(ctx, args, output)
            return output

        def forward_of_lists(ctx, *flat):
            return forward(ctx, *_nested(flat, flat[-1]))

        def gradients_of_lists(ctx, *pulls):
            flat = ctx.needs_input_grad
            ctx.needs_input_grad = _nested(flat, ctx.lengths)
            try:
                return *_flat(gradients(ctx, *pulls), ctx.lengths), None
            finally:
                ctx.needs_input_grad = flat

        def make(forward, backward) -> Callable:
            return type(self.name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply

        if any(self.lists):
            def lengths_of(args) -> Lengths:
                return tuple(len(x) if several else None for several, x in zip(self.lists, args))

            apply = make(forward_of_lists, gradients_of_lists)
            def function(*args):
                lengths = lengths_of(args)
                return apply(*_flat(args, lengths), lengths)

            self.function = function
        else:
            alone = (None,) * len(self.lists)

            def lengths_of(args) -> Lengths:
                return alone

            self.function = make(forward, gradients)
        self.registered.register_autograd(gradients, setup_context=keep)


def _flat(args: Iterable, lengths: Lengths) -> list:
    """The arguments with the tensors of lists among them: a Function sees no tensor inside a list."""
    return [x for arg, n in zip(args, lengths) for x in ((arg,) if n is None else arg)]


def _nested(flat: Iterable, lengths: Lengths) -> tuple:
    """What `_flat` was made of; what follows in `flat` is left out."""
    rest = iter(flat)
    return tuple(next(rest) if n is None else list(itertools.islice(rest, n)) for n in lengths)
