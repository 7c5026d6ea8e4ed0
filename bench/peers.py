"""Models of other packages at the shape of one of ours: what compare.speed compares with."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from model.shape import Shape


class Peer(nn.Module):
    """A model of another package, asked for logits alone: (B, T) -> (B, T, V)."""

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.model(tokens))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is theirs: this class is one for all, and torch counts its programs."""
        self.model.compile(*args, **kwargs)


def common(shape: Shape) -> dict[str, Any]:
    """What every config of transformers takes by one name."""
    return {
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }


def gpt2(shape: Shape) -> Peer:
    """transformers' GPT-2, with the exact GELU; its layers have biases whether asked or not."""
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
    return Peer(GPT2LMHeadModel(config), lambda found: found.logits)


def llama(shape: Shape) -> Peer:
    """transformers' Llama, with as many weights in its feed-forward; it has RoPE and RMSNorm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **common(shape),
        hidden_size=shape.dim,
        intermediate_size=8 * shape.dim // 3,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_len,
    )
    return Peer(LlamaForCausalLM(config), lambda found: found.logits)


def litgpt(shape: Shape) -> Peer:
    """litgpt's GPT as GPT-NeoX: LayerNorm and GELU; no positions at all, which saves it a little."""
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
    return Peer(GPT(config), lambda found: found)


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
    return Peer(model, lambda found: found)


PEERS: dict[str, Callable[[Shape], Peer]] = {
    "transformers GPT-2": gpt2,
    "transformers Llama": llama,
    "litgpt": litgpt,
    "x-transformers": x_transformers,
}
WITH_DROPOUT = ("transformers GPT-2", "x-transformers")  # where GPT-2 has it


def installed(dropout: float) -> dict[str, Callable[[Shape], Peer]]:
    """The peers that this Python has, by name; with dropout those that have it in the same places."""
    here = {
        name: build
        for name, build in PEERS.items()
        if find_spec(name.split()[0].replace("-", "_")) is not None
    }
    return {n: build for n, build in here.items() if not dropout or n in WITH_DROPOUT}
