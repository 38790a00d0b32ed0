"""How far AdEMAMix moves parameters whose gradients have stopped, or come rarely."""

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eqx_ademamix import AdEMAMix, SplitBfloat16, StateFormat, init, update


SIZE = 4096  # entries: as many as `StateFormat` encodes by default
NOISY, SILENT = 1000, 20_000  # steps
ROWS, EVERY, STEPS = 16, 5000, 12_000
FORMATS = {
    "float32": StateFormat.float32(),
    "half": StateFormat.half(),
    "compact": StateFormat.compact(),
    "bfloat16": StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "split": StateFormat(jnp.float32, SplitBfloat16(), jnp.float32),
}
# The updates are in units of the learning rate.
PLAIN = AdEMAMix(1.0, b3=0.9999, alpha=5.0, b2=0.999)
# |m2| / sqrt(nu) after a single gradient, for any gradient: (1 - b3) / sqrt(1 - b2).
FRESH = 1e-4 / 1e-3**0.5


Options: TypeAlias = dict[str, float]
# The columns of the first table in docs/guards.md, and the rows of the second.
AFTER_SILENCE: list[Options] = [{}, {"max_slow_ratio": 1.0}, {"clip_update_rms": 1.0}]
RARE_ROWS: list[Options] = [
    {},
    {"max_slow_ratio": 1.0},
    {"max_slow_ratio": 0.1},
    {"max_slow_ratio": 0.01},
    {"clip_update_rms": 1.0},
    {"b2": 0.9999},
    {"b3": 0.999},
    {"alpha": 0.0},
]


class Push(NamedTuple):
    """How far the entries move, in learning rates."""

    median: float
    largest: float

    def __str__(self) -> str:
        return f"{_short(self.median)}; {_short(self.largest)}"

    @classmethod
    def of(cls, x: Array) -> "Push":
        size = np.abs(np.asarray(x))
        return cls(float(np.median(size)), float(size.max()))


def with_format(name: str) -> AdEMAMix:
    return dataclasses.replace(PLAIN, state_format=FORMATS[name])


def after_silence(name: str, options: list[Options]) -> list[Push]:
    """The update after 1000 steps with noisy gradients and 20,000 with none. None of
    the options changes the moments, so all updates are computed from one state."""
    optim, zeros = with_format(name), jnp.zeros(SIZE)

    def step(state, g):
        return update(optim, g, state)[1]

    @jax.jit
    def run():
        key = jax.random.key(0)
        noise = lambda t: jax.random.normal(jax.random.fold_in(key, t), (SIZE,))
        state = init(optim, zeros)
        state = jax.lax.fori_loop(0, NOISY, lambda t, s: step(s, noise(t)), state)
        return jax.lax.fori_loop(0, SILENT - 1, lambda _, s: step(s, zeros), state)

    state = run()
    with_options = (dataclasses.replace(optim, **changed) for changed in options)
    return [Push.of(update(o, zeros, state)[0]) for o in with_options]


def rare_rows(options: list[Options]) -> list[Push]:
    """How far the entries of an embedding move in 12,000 steps, in learning rates: the
    sum of the magnitudes of all steps. Each row has a gradient once in 5000 steps."""
    optims = [dataclasses.replace(PLAIN, **changed) for changed in options]
    shape = ROWS, SIZE // ROWS
    key, rows = jax.random.key(0), jnp.arange(ROWS)[:, None]

    def step(t, carry):
        noise = jax.random.normal(jax.random.fold_in(key, t), shape)
        # The rows take turns: row i at the steps i * 312, i * 312 + 5000, ...
        g = jnp.where(t % EVERY == rows * (EVERY // ROWS), noise, 0.0)
        return [_moved(o, g, *x) for o, x in zip(optims, carry, strict=True)]

    @jax.jit
    def run() -> list[Float[Array, "..."]]:
        zeros = jnp.zeros(shape)
        carry = [(init(o, zeros), zeros) for o in optims]
        return [x for _, x in jax.lax.fori_loop(0, STEPS, step, carry)]

    return [Push.of(x) for x in run()]


def _moved(optim, g, state, total):
    u, state = update(optim, g, state)
    return state, total + jnp.abs(u)


#
# The tables
#


def measured() -> dict[str, list[Push]]:
    """What the tables show: for each format after silence, and for rare rows."""
    silence = {name: after_silence(name, AFTER_SILENCE) for name in FORMATS}
    return {**silence, "rare": rare_rows(RARE_ROWS)}


def silence_table(found: dict[str, list[Push]]) -> str:
    names = ["format", *map(_text, AFTER_SILENCE)]
    rows = [[name, *map(str, found[name])] for name in FORMATS]
    return as_table(names, rows)


def rare_table(found: dict[str, list[Push]]) -> str:
    pairs = zip(RARE_ROWS, found["rare"], strict=True)
    return as_table(
        ["option", "median; largest"],
        [[_text(changed), str(push)] for changed, push in pairs],
    )


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _text(changed: Options) -> str:
    names = [f"`{name}={value}`" for name, value in changed.items()]
    return ", ".join(names) or "no guard"


def as_table(names: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
