"""What forms of linear attention share.

Shapes: B batch, T new tokens, D dim, H heads, Dk key_dim, Dv = head_dim, c tokens of a chunk.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.recurrent.base import Recurrent
from model.ops.norm import RMSNorm
from model.shape import Shape


class LinearAttention(Recurrent):
    """Attention without softmax: the past is a matrix (Dk, Dv) per head, which queries read.

    A text is read by chunks of `chunk` tokens: pairs of tokens within a chunk, the state between
    chunks. Head outputs are normalised and gated: y_t = (norm(o_t) * swish(x_t W_g)) W_o.
    Raises ValueError for a chunk or a key below 1.
    """

    own_kernel = "chunks"
    #: Products of the state with each token of a chunk: with its query, or its key as well.
    reads: int

    def __init__(self, shape: Shape, layer: int, key_dim: int, chunk: int) -> None:
        super().__init__(shape, layer)
        if key_dim < 1:
            raise ValueError(f"key_dim={key_dim} must be at least 1")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        self.key_dim, self.chunk = key_dim, chunk
        self.q = nn.Linear(shape.dim, shape.n_heads * key_dim, bias=shape.bias)
        self.k = nn.Linear(shape.dim, shape.n_heads * key_dim, bias=shape.bias)
        self.v = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.norm = RMSNorm(shape.head_dim, shape.bias)
        self.gate = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * Dh) -> (B, H, T, Dh), float32."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2).float()

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """What the heads have read, o (B, H, T, Dv), normalised and gated by x (B, T, D)."""
        o = self.norm(o).transpose(1, 2).flatten(2)  # (B, T, D)
        gate = F.silu(self.gate(x))
        return self.out(o.to(gate.dtype) * gate)

    def state_shapes(self) -> list[tuple[int, ...]]:
        return [(self.n_heads, self.key_dim, self.head_dim)]

    # Cost

    def pair_flops(self, c: int, causal: bool) -> float:
        """FLOPs of one head within a chunk of c tokens."""
        raise NotImplementedError

    def score_flops(self, length: int, causal: bool) -> float:
        """Pairs within chunks; the first chunk reads no state, and after the last none is made."""
        whole, rest = divmod(length, self.chunk)
        pairs = whole * self.pair_flops(self.chunk, causal)
        pairs += self.pair_flops(rest, causal) if rest else 0
        reading = length - min(length, self.chunk)
        writing = length - (rest or self.chunk)
        state = 2 * self.key_dim * self.head_dim * (self.reads * reading + writing)
        return self.n_heads * (pairs + state) / length

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """All matrices, and a chunk of one token; without the state, those that make it again."""
        weights = {n: m.weight.numel() for n, m in self.named_modules() if isinstance(m, nn.Linear)}
        product = 2 * self.n_heads * self.key_dim * self.head_dim
        token = 2 * sum(weights.values()) + self.n_heads * self.pair_flops(1, causal=False)
        token += (self.reads + 1) * product
        again = 2 * sum(n for name, n in weights.items() if name not in ("q", "gate", "out"))
        return token + (0 if cached else (again + self.reads * product) * length)
