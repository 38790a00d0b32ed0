"""The handwritten digits, 8 by 8 pixels each, that come with scikit-learn."""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


Batch: TypeAlias = tuple[Float[Array, "batch 64"], Int[Array, " batch"]]


class Digits(NamedTuple):
    """Images and labels, split into a training set and a held-out set."""

    train: Batch
    held_out: Batch


def read_digits() -> Digits:
    """Reads all 1797 digits and holds out a quarter of them."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, random_state=0)
    x, x_held_out, y, y_held_out = (jnp.asarray(part) for part in split)
    x, x_held_out = x.astype(jnp.float32), x_held_out.astype(jnp.float32)
    return Digits((x, y.astype(jnp.int32)), (x_held_out, y_held_out.astype(jnp.int32)))


def batch(data: Batch, size: int, seed: int, step: int) -> Batch:
    """Random images. The choice depends only on the seed and the step."""
    images, labels = data
    rows = np.random.default_rng((seed, step)).integers(len(images), size=size)
    return images[rows], labels[rows]


def mean_loss(model: eqx.Module, data: Batch) -> Float[Array, ""]:
    """The mean cross-entropy, in nats."""
    images, labels = data
    logits = jax.vmap(model)(images)  # pyright: ignore[reportArgumentType]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def accuracy(model: eqx.Module, data: Batch) -> Float[Array, ""]:
    """The fraction of images that are classified correctly."""
    images, labels = data
    logits = jax.vmap(model)(images)  # pyright: ignore[reportArgumentType]
    return (logits.argmax(axis=1) == labels).mean()
