"""The library on one page: classifies handwritten digits in a few seconds."""

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eqx_ademamix


NUM_STEPS = 1000
Batch = tuple[Float[Array, "batch 64"], Int[Array, " batch"]]


def mean_loss(model: eqx.nn.MLP, batch: Batch) -> Float[Array, ""]:
    images, labels = batch
    logits = jax.vmap(model)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


@eqx.filter_jit(donate="all-except-first")
def train_step(
    batch: Batch,
    model: eqx.nn.MLP,
    state: eqx_ademamix.AdEMAMixState,
    optim: eqx_ademamix.AdEMAMix,
) -> tuple[eqx.nn.MLP, eqx_ademamix.AdEMAMixState]:
    grads = eqx.filter_grad(mean_loss)(model, batch)
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    return eqx.apply_updates(model, updates), state


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, random_state=0)
    x, x_test, y, y_test = map(jax.numpy.asarray, split)

    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    optim = eqx_ademamix.AdEMAMix(
        learning_rate=optax.cosine_decay_schedule(4e-3, NUM_STEPS),
        b3=eqx_ademamix.beta3_scheduler(0.99, 0.9, warmup=NUM_STEPS),
        alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=NUM_STEPS),
        weight_decay=0.1,
        weight_decay_mask=eqx_ademamix.decay_mask(model),
    )
    for sentence in eqx_ademamix.review(optim, num_steps=NUM_STEPS):
        print(sentence)
    state = eqx_ademamix.init(optim, model)

    rng = np.random.default_rng(0)
    for rows in rng.integers(len(x), size=(NUM_STEPS, 64)):
        model, state = train_step((x[rows], y[rows]), model, state, optim)

    accuracy = (jax.vmap(model)(x_test).argmax(axis=1) == y_test).mean()
    print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
