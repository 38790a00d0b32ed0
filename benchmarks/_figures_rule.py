"""Figures of the update rule itself.

They show the weights on past gradients, the schedules, the effect of alpha, and the
size of the updates of a small network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _drawing import BLUE, GRAY, GREEN, ORANGE, RED, Number, legend, panels, save
from _figures_toy import float64
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits

import eqx_ademamix


#
# The weights on past gradients (after Figure 3a of the paper)
#


def past_weights(
    steps: int, b1: float = 0.9, b3: float = 0.9999, alpha: float = 0.0
) -> Float[np.ndarray, " steps"]:
    """What is left of a gradient of 1 in m1 + alpha m2, after 0, 1, ... steps.

    The values come from the state of the optimizer. One gradient is 1, and all later
    gradients are 0.
    """
    optim = eqx_ademamix.AdEMAMix(1.0, b1=b1, b3=b3, alpha=alpha)

    def step(state: Any, grad: Array) -> tuple[Any, Array]:
        _, state = eqx_ademamix.update(optim, grad, state)
        return state, state.m1 + alpha * state.m2

    with float64():
        grads = jnp.zeros(steps).at[0].set(1.0)
        state = eqx_ademamix.init(optim, grads[0])
        scan = lambda state: jax.lax.scan(step, state, grads)[1]
        return np.asarray(jax.jit(scan)(state))


def past_gradients(path: Path, short: bool) -> list[Number]:
    """Plots the weights of past gradients, and how much weight is on old gradients."""
    steps = 1000 if short else 100_000
    curves = (
        ("Adam, b1 = 0.9", past_weights(steps), GRAY),
        ("Adam, b1 = 0.9999", past_weights(steps, b1=0.9999), BLUE),
        ("AdEMAMix, b3 = 0.9999, alpha = 5", past_weights(steps, alpha=5.0), RED),
    )
    figure, (weights, shares) = panels(2)
    ages = np.arange(1, steps + 1)
    for label, values, color in curves:
        weights.plot(ages, values, color=color, label=label)
        shares.plot(ages, _share_of_older(values), color=color, label=label)
    weights.set(xscale="log", yscale="log", ylim=(1e-7, 1), ylabel="weight")
    weights.set_title("weight of a past gradient")
    shares.set(xscale="log", ylabel="share of the total weight")
    shares.set_title("weight on gradients at least that old")
    for axes in (weights, shares):
        axes.set_xlabel("steps ago (1: the current gradient)")
    legend(weights, loc="upper right")
    save(figure, path)
    return [
        Number(f"{label}: share at least {age} steps old", share)
        for label, values, _ in curves
        for age in (100, 10_000)
        if age < steps
        for share in [_share_of_older(values)[age]]
    ]


def _share_of_older(weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.cumsum(weights[::-1])[::-1] / np.sum(weights)


#
# The schedules during a run
#


def schedules(path: Path, short: bool) -> list[Number]:
    """Plots alpha, b3, and the half-life of b3 during a run that the schedules span."""
    steps = 256_000
    alpha = eqx_ademamix.alpha_scheduler(8.0, warmup=steps)
    b3 = eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=steps)
    with float64():
        times = np.linspace(0, steps, 1001)
        alphas, complements = np.asarray(alpha(times)), np.asarray(b3.complement(times))
        linear = 0.1 + (1e-4 - 0.1) * times / steps
        early = 1 - float(b3.complement(1000))
    half_life = lambda complement: -np.log(2) / np.log1p(-complement)
    figure, axes = panels(3, 9.6, 3.4)
    axes[0].plot(times, alphas, color=RED)
    axes[0].set(title="alpha", ylim=(0, 8.4))
    for x, color, label in (
        (complements, RED, "beta3_scheduler"),
        (linear, GRAY, "linear in b3, for comparison"),
    ):
        axes[1].plot(times, x, color=color, label=label)
        axes[2].plot(times, half_life(x), color=color)
    axes[1].set(title="1 - b3", yscale="log")
    axes[2].set(title="half-life of the slow average (steps)")
    legend(axes[1], loc="center", fontsize="x-small")
    for one in axes:
        one.set(xlabel="step", xticks=[0, 128_000, 256_000])
    save(figure, path)
    middle = half_life(complements[500])
    return [
        Number("b3 at step 1000 of 256000", early, 6),
        Number("half-life in the middle of the run", middle),
        Number("half-life at the end", half_life(complements[-1])),
    ]


#
# The effect of alpha
#


@eqx.filter_jit
def drift_and_noise(
    alphas: Float[Array, " alphas"], drift: float, steps: int
) -> tuple[Float[Array, " alphas"], Float[Array, " alphas"]]:
    """The mean and the standard deviation of the update.

    The gradients are unit noise around a small mean. Both results are in units of the
    learning rate.
    """
    noise = jax.random.normal(jax.random.key(0), (2 * steps, 64))

    def run(optim: eqx_ademamix.AdEMAMix) -> Float[Array, "steps 64"]:
        def step(state: Any, noise: Array) -> tuple[Any, Array]:
            updates, state = eqx_ademamix.update(optim, -noise - drift, state)
            return state, updates

        state = eqx_ademamix.init(optim, noise[0])
        # The first half fills the averages.
        return jax.lax.scan(step, state, noise)[1][steps:]

    # One program for all values: alpha is an array with an axis to map over.
    optims = eqx.filter_vmap(
        lambda alpha: eqx_ademamix.AdEMAMix(1.0, b3=0.999, alpha=alpha)
    )(alphas)
    updates = eqx.filter_vmap(run)(optims)
    return updates.mean(axis=(1, 2)), updates.std(axis=1).mean(axis=1)


def what_alpha_does(path: Path, short: bool) -> list[Number]:
    """Where gradients agree, updates grow with alpha. The noise hardly grows."""
    alphas, drift = np.linspace(0.0, 10.0, 11), 0.1
    steps = 1000 if short else 8000
    means, noises = (
        np.asarray(x) for x in drift_and_noise(jnp.asarray(alphas), drift, steps)
    )
    figure, (sizes, ratio) = panels(2)
    sizes.plot(alphas, means, "o-", color=RED, label="mean: along the true gradient")
    sizes.plot(alphas, noises, "o-", color=GRAY, label="standard deviation: noise")
    sizes.set(ylabel="update / learning rate", ylim=0, title="size of the update")
    ratio.plot(alphas, means / noises, "o-", color=RED)
    ratio.set(ylabel="mean / standard deviation", ylim=0, title="signal to noise")
    for axes in (sizes, ratio):
        axes.set_xlabel("alpha")
    legend(sizes)
    save(figure, path)
    return [
        Number(f"alpha = {alphas[i]:g}: {name} of the update / learning rate", x[i])
        for i in (0, 5, 10)
        for name, x in (("mean", means), ("standard deviation", noises))
    ]


#
# The size of the updates (after Figure 27 of the paper)
#


Batches = tuple[Float[Array, "steps batch 64"], Int[Array, "steps batch"]]


def digits(steps: int) -> Batches:
    images, labels = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).integers(len(images), size=(steps, 64))
    return jnp.asarray(images[rows] / 16, jnp.float32), jnp.asarray(labels[rows])


def cross_entropy(model: eqx.nn.MLP, batch: Any) -> Float[Array, ""]:
    images, labels = batch
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def train(
    optim: eqx_ademamix.AdEMAMix, model: eqx.nn.MLP, batches: Batches
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Trains a network. Returns the norm of the update and the loss at each step."""
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(carry: Any, batch: Any) -> tuple[Any, tuple[Array, Array]]:
        arrays, state = carry
        model = eqx.combine(arrays, static)
        loss, grads = eqx.filter_value_and_grad(cross_entropy)(model, batch)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        arrays = eqx.apply_updates(arrays, updates)
        return (arrays, state), (optax.global_norm(updates), loss)

    return jax.lax.scan(step, (arrays, eqx_ademamix.init(optim, model)), batches)[1]


def update_norm(path: Path, short: bool) -> list[Number]:
    """Plots the norm of the update and the loss of a network that classifies digits."""
    steps = 100 if short else 4000
    b3 = eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=steps)
    alpha = eqx_ademamix.alpha_scheduler(8.0, warmup=steps)
    runs: Sequence[tuple[str, Any, Any, str]] = (
        ("alpha = 0 (AdamW)", 0.999, 0.0, GRAY),
        ("no schedule", 0.999, 8.0, BLUE),
        ("alpha scheduled", 0.999, alpha, ORANGE),
        ("b3 scheduled", b3, 8.0, GREEN),
        ("both scheduled", b3, alpha, RED),
    )
    model = eqx.nn.MLP(64, 10, width_size=32, depth=2, key=jax.random.key(0))
    batches, numbers = digits(steps), list[Number]()
    figure, (norms, losses) = panels(2, 10.5)
    for label, b3, alpha, color in runs:
        optim = eqx_ademamix.AdEMAMix(1e-3, b3=b3, alpha=alpha, weight_decay=0.1)
        norm, loss = (np.asarray(x) for x in train(optim, model, batches))
        norms.plot(*_means(norm), color=color, label=label)
        losses.plot(*_means(loss), color=color, label=label)
        numbers += [
            Number(f"{label}: largest norm of an update", norm.max()),
            Number(f"{label}: step of the largest norm", int(norm.argmax()) + 1),
        ]
    norms.set(ylabel="norm of the update", yscale="log", title="size of the updates")
    losses.set(ylabel="loss (nats)", yscale="log", title="training loss")
    for axes in (norms, losses):
        axes.set_xlabel("step")
    legend(norms)
    save(figure, path)
    return numbers


def _means(values: Float[np.ndarray, " n"], width: int = 20) -> tuple[np.ndarray, ...]:
    """Returns steps and the mean value around each step."""
    means = values.reshape(-1, width).mean(axis=1)
    return (np.arange(len(means)) + 0.5) * width, means
