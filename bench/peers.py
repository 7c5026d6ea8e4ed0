"""Models of other packages at the shape of one of ours, for bench.step_time."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from model.shape import Shape


class Peer(nn.Module):
    """A model of another package that returns logits: (B, T) -> (B, T, V)."""

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.model(tokens))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the inner model: torch limits the programs of one class, and all peers share this one."""
        self.model.compile(*args, **kwargs)


def common(shape: Shape) -> dict[str, Any]:
    """Options that all configs of transformers share."""
    return {
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }


def gpt2(shape: Shape) -> Peer:
    """transformers' GPT-2 with the exact GELU; its layers always have biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **common(shape),
        n_positions=shape.max_len,
        n_embd=shape.dim,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        activation_function="gelu",
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
    )
    return Peer(GPT2LMHeadModel(config), lambda output: output.logits)


def llama(shape: Shape) -> Peer:
    """transformers' Llama (RoPE, RMSNorm, SwiGLU) with as many feed-forward weights as ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **common(shape),
        hidden_size=shape.dim,
        intermediate_size=8 * shape.dim // 3,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_len,
    )
    return Peer(LlamaForCausalLM(config), lambda output: output.logits)


def litgpt(shape: Shape) -> Peer:
    """litgpt's GPT as GPT-NeoX (LayerNorm, GELU), without positions, which saves it a little time."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=shape.max_len,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.dim,
        rotary_percentage=0.0,
        parallel_residual=False,
        bias=shape.bias,
    )
    return Peer(GPT(config), lambda output: output)


def x_transformers(shape: Shape) -> Peer:
    """x-transformers' decoder, with its flash attention."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=shape.dim,
        depth=shape.n_layers,
        heads=shape.n_heads,
        attn_dim_head=shape.head_dim,
        attn_flash=True,
        attn_dropout=shape.dropout,
        ff_dropout=shape.dropout,
        ff_no_bias=not shape.bias,
    )
    model = TransformerWrapper(
        num_tokens=shape.vocab_size,
        max_seq_len=shape.max_len,
        attn_layers=layers,
        emb_dropout=shape.dropout,
        tie_embedding=shape.tie_embeddings,
    )
    return Peer(model, lambda output: output)


PEERS: dict[str, Callable[[Shape], Peer]] = {
    "transformers GPT-2": gpt2,
    "transformers Llama": llama,
    "litgpt": litgpt,
    "x-transformers": x_transformers,
}
WITH_DROPOUT = ("transformers GPT-2", "x-transformers")  # in the same places as GPT-2


def installed(dropout: float) -> dict[str, Callable[[Shape], Peer]]:
    """The installed peers by name; with dropout, only those that have it in the same places."""
    return {
        name: build
        for name, build in PEERS.items()
        if find_spec(name.split()[0].replace("-", "_")) and (not dropout or name in WITH_DROPOUT)
    }
