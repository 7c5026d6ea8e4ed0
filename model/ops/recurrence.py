"""The Elman and LSTM recurrences, each next to its plain form.

A loop over tokens with a backward pass of its own: autograd's would sum one gradient of the weight
per token, and takes four times as long on a CPU. torch's fused LSTM is about as fast, but its FLOPs
are not counted, and torch has no network with `slide`. torch.compile unrolls the loop: compilation
takes time in proportion to the length.

Shapes: B batch, T tokens, R width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def slide(x: Tensor) -> Tensor:
    """x between 0 and 1, and the nearer of the two outside."""
    return x.clamp(0, 1)


#: Activations of the Elman network, and their derivatives as functions of their values.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda h: 1 - h * h),
    "slide": (slide, lambda h: ((h > 0) & (h < 1)).to(h.dtype)),
}


def elman_reference(x: Tensor, w: Tensor, h: Tensor, activation: str) -> Tensor:
    """h_t = activation(x_t + W h_{t-1}): x (B, T, R), w (R, R), h (B, R) -> (B, T, R)."""
    states = []
    for x_t in x.unbind(1):
        h = ACTIVATIONS[activation][0](x_t + h @ w.T)
        states.append(h)
    return torch.stack(states, dim=1)


class ElmanFunction(torch.autograd.Function):
    """`elman_reference`, with one product for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, h: Tensor, activation: str) -> Tensor:
        apply, ctx.derivative = ACTIVATIONS[activation]
        states = [h]
        for x_t in x.unbind(1):
            states.append(apply(torch.addmm(x_t, states[-1], w.T)))
        ctx.save_for_backward(w, *states)
        return torch.stack(states[1:], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        w, *states = ctx.saved_tensors
        grad_h, grads = torch.zeros_like(states[0]), []
        for h, grad_t in zip(reversed(states[1:]), reversed(grad.unbind(1)), strict=True):
            grads.append((grad_t + grad_h) * ctx.derivative(h))
            grad_h = grads[-1] @ w
        grad_x = torch.stack(grads[::-1], dim=1)  # (B, T, R)
        return grad_x, weight_gradient(grad_x, states), grad_h, None


def weight_gradient(grad_x: Tensor, states: list[Tensor]) -> Tensor:
    """The sum over tokens of grad_x_t^T h_{t-1}."""
    before = torch.stack(states[:-1], dim=1)  # (B, T, R)
    return grad_x.flatten(0, 1).T @ before.flatten(0, 1)


def lstm_reference(x: Tensor, w: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """i, f, g, o = x_t + W h_{t-1}; c_t = s(f + 1) c_{t-1} + s(i) tanh(g); h_t = s(o) tanh(c_t).

    s is the sigmoid. x (B, T, 4 R), w (4 R, R), h and c (B, R) -> all h (B, T, R) and the last c.
    The 1 keeps the cell at the start of training (Gers et al. 2000; Jozefowicz et al. 2015).
    """
    states = []
    for x_t in x.unbind(1):
        i, f, g, o = (x_t + h @ w.T).to(c.dtype).chunk(4, dim=1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()).to(x.dtype)
        states.append(h)
    return torch.stack(states, dim=1), c


class LSTMFunction(torch.autograd.Function):
    """`lstm_reference`, with one product for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        hs, cs, gates = [h], [c], []
        for x_t in x.unbind(1):
            i, f, g, o = torch.addmm(x_t, hs[-1], w.T).to(c.dtype).chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), (f + 1).sigmoid(), g.tanh(), o.sigmoid()
            cs.append(torch.addcmul(f * cs[-1], i, g))
            hs.append((o * cs[-1].tanh()).to(x.dtype))
            gates += [i, f, g, o]
        ctx.save_for_backward(w, *hs, *cs, *gates)
        return torch.stack(hs[1:], dim=1), cs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        T = grad.size(1)
        w, *saved = ctx.saved_tensors
        hs, cs, gates = saved[: T + 1], saved[T + 1 : 2 * T + 2], saved[2 * T + 2 :]
        grad_h, grads = torch.zeros_like(hs[0]), []
        for t in reversed(range(T)):
            i, f, g, o = gates[4 * t : 4 * t + 4]
            grad_t, tanh_c = (grad[:, t] + grad_h).to(grad_c.dtype), cs[t + 1].tanh()
            grad_c = grad_c + grad_t * o * (1 - tanh_c * tanh_c)
            grad_gates = torch.cat(
                (
                    grad_c * g * i * (1 - i),
                    grad_c * cs[t] * f * (1 - f),
                    grad_c * i * (1 - g * g),
                    grad_t * tanh_c * o * (1 - o),
                ),
                dim=1,
            )
            grads.append(grad_gates.to(w.dtype))
            grad_h, grad_c = grads[-1] @ w, grad_c * f
        grad_x = torch.stack(grads[::-1], dim=1)  # (B, T, 4 R)
        return grad_x, weight_gradient(grad_x, hs), grad_h, grad_c


elman = cast(Callable[[Tensor, Tensor, Tensor, str], Tensor], ElmanFunction.apply)
lstm = cast(Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], LSTMFunction.apply)
