"""A small transformer that reads bytes and predicts the next byte."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


NUM_BYTES = 256


class Block(eqx.Module):
    """Causal attention, then an MLP. Each follows a norm and has a skip connection."""

    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=attention_key)
        self.mlp_norm = eqx.nn.LayerNorm(width)
        self.mlp = eqx.nn.MLP(
            width, width, 4 * width, depth=1, activation=jax.nn.gelu, key=mlp_key
        )

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        normed = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(normed, normed, normed, mask=causal)
        return x + jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(x))


class Transformer(eqx.Module):
    """Maps up to `context` bytes to logits for the byte that follows each of them."""

    bytes_embedding: eqx.nn.Embedding
    position_embedding: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(
        self, width: int, depth: int, heads: int, context: int, *, key: PRNGKeyArray
    ):
        byte_key, position_key, head_key, *block_keys = jax.random.split(key, 3 + depth)
        self.bytes_embedding = eqx.nn.Embedding(NUM_BYTES, width, key=byte_key)
        self.position_embedding = eqx.nn.Embedding(context, width, key=position_key)
        self.blocks = [Block(width, heads, key=key) for key in block_keys]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, NUM_BYTES, key=head_key)

    def __call__(self, text: Int[Array, " length"]) -> Float[Array, "length bytes"]:
        x = jax.vmap(self.bytes_embedding)(text)
        x = x + jax.vmap(self.position_embedding)(jnp.arange(len(text)))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


@eqx.filter_jit
def generate(
    model: Transformer,
    prompt: bytes,
    num_bytes: int,
    temperature: float,
    key: PRNGKeyArray,
) -> Int[Array, " length"]:
    """Returns the prompt plus `num_bytes` bytes, sampled one by one from the model."""
    context = model.position_embedding.num_embeddings
    length = len(prompt) + num_bytes
    text = jnp.zeros(max(length, context), jnp.int32)
    text = text.at[: len(prompt)].set(jnp.array(list(prompt)))

    def write(text: Array, i: Array) -> tuple[Array, None]:
        start = jnp.maximum(0, i - context)
        # The text from position `i` onward is still blank. Causal attention ignores it.
        window = jax.lax.dynamic_slice(text, (start,), (context,))
        logits = model(window)[i - start - 1] / temperature
        byte = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return text.at[i].set(byte), None

    text, _ = jax.lax.scan(write, text, jnp.arange(len(prompt), length))
    return text[:length]
