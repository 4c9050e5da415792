"""Parameter shapes of published models, scaled with their structure kept. Standard library only.

A scale cuts every width by the same factor and leaves alone what makes the structure: layers, experts, which tensors
there are. Tensors that share a width go on sharing it.

Source: the models' published configurations (``config.json``): Llama 3 8B and 70B, Llama 3.1 405B, Kimi K2 (1.03e12
parameters, of the architecture of DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Llama", "MixtureOfExperts", "Parameter", "Scaled"]

Scaled = Callable[[int], int]
"""From a published width to the one that is used."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        name: its FQN.
        shape: global.
        tp_dim: the dim that tensor parallelism cuts; None where it replicates.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None = None


@dataclass(frozen=True)
class Llama:
    """A dense decoder with grouped-query attention and SwiGLU."""

    width: int
    num_layers: int
    kv_width: int
    hidden: int
    vocabulary: int = 128_256

    def parameters(self, scaled: Scaled) -> Iterator[Parameter]:
        """Yields every parameter, in the order of the model."""
        width, kv_width, hidden = scaled(self.width), scaled(self.kv_width), scaled(self.hidden)
        vocabulary = scaled(self.vocabulary)
        yield Parameter("tok_embeddings.weight", (vocabulary, width), 0)
        for layer in range(self.num_layers):
            at = f"layers.{layer}"
            yield Parameter(f"{at}.attention.wq.weight", (width, width), 0)
            yield Parameter(f"{at}.attention.wk.weight", (kv_width, width), 0)
            yield Parameter(f"{at}.attention.wv.weight", (kv_width, width), 0)
            yield Parameter(f"{at}.attention.wo.weight", (width, width), 1)
            yield Parameter(f"{at}.feed_forward.w1.weight", (hidden, width), 0)
            yield Parameter(f"{at}.feed_forward.w2.weight", (width, hidden), 1)
            yield Parameter(f"{at}.feed_forward.w3.weight", (hidden, width), 0)
            yield Parameter(f"{at}.attention_norm.weight", (width,))
            yield Parameter(f"{at}.ffn_norm.weight", (width,))
        yield Parameter("norm.weight", (width,))
        yield Parameter("output.weight", (vocabulary, width), 0)


@dataclass(frozen=True)
class MixtureOfExperts:
    """A decoder with latent attention whose layers hold many experts, stacked into one tensor per matrix."""

    width: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 1
    num_experts: int = 384
    expert_hidden: int = 2048
    dense_hidden: int = 18_432
    num_heads: int = 64
    query_rank: int = 1536
    kv_rank: int = 512
    rotary: int = 64
    head: int = 128
    vocabulary: int = 163_840

    def parameters(self, scaled: Scaled) -> Iterator[Parameter]:
        """Yields every parameter, in the order of the model."""
        width, vocabulary = scaled(self.width), scaled(self.vocabulary)
        yield Parameter("tok_embeddings.weight", (vocabulary, width), 0)
        for layer in range(self.num_layers):
            at = f"layers.{layer}"
            yield from self._attention(f"{at}.attention", scaled)
            if layer < self.num_dense_layers:
                yield from _swiglu(f"{at}.feed_forward", width, scaled(self.dense_hidden))
            else:
                hidden = scaled(self.expert_hidden)
                yield Parameter(f"{at}.moe.router.gate.weight", (self.num_experts, width))
                yield Parameter(f"{at}.moe.expert_bias", (self.num_experts,))
                yield Parameter(f"{at}.moe.experts.w1", (self.num_experts, hidden, width), 1)
                yield Parameter(f"{at}.moe.experts.w2", (self.num_experts, width, hidden), 2)
                yield Parameter(f"{at}.moe.experts.w3", (self.num_experts, hidden, width), 1)
                yield from _swiglu(f"{at}.moe.shared_experts", width, hidden)
            yield Parameter(f"{at}.attention_norm.weight", (width,))
            yield Parameter(f"{at}.ffn_norm.weight", (width,))
        yield Parameter("norm.weight", (width,))
        yield Parameter("output.weight", (vocabulary, width), 0)

    def _attention(self, at: str, scaled: Scaled) -> Iterator[Parameter]:
        width, query_rank, kv_rank = scaled(self.width), scaled(self.query_rank), scaled(self.kv_rank)
        queries = scaled(self.num_heads * (self.head + self.rotary))
        yield Parameter(f"{at}.wq_a.weight", (query_rank, width))
        yield Parameter(f"{at}.q_norm.weight", (query_rank,))
        yield Parameter(f"{at}.wq_b.weight", (queries, query_rank), 0)
        yield Parameter(f"{at}.wkv_a.weight", (kv_rank + scaled(self.rotary), width))
        yield Parameter(f"{at}.kv_norm.weight", (kv_rank,))
        yield Parameter(f"{at}.wkv_b.weight", (scaled(2 * self.num_heads * self.head), kv_rank), 0)
        yield Parameter(f"{at}.wo.weight", (width, scaled(self.num_heads * self.head)), 1)


def _swiglu(at: str, width: int, hidden: int) -> Iterator[Parameter]:
    yield Parameter(f"{at}.w1.weight", (hidden, width), 0)
    yield Parameter(f"{at}.w2.weight", (width, hidden), 1)
    yield Parameter(f"{at}.w3.weight", (hidden, width), 0)
