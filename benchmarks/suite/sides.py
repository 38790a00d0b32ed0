"""The optimizers in JAX: ours and optax's, each as users call it."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, SimplifiedAdEMAMix, StateFormat

from . import cases
from .trees import Tree, count, moved_bytes, num_bytes


LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
SETTINGS: dict[str, Any] = dict(b3=0.9999, alpha=5.0, weight_decay=WEIGHT_DECAY)


class Side(NamedTuple):
    """An optimizer: its state, and a step with parameters, state, and gradients."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]
    dtype: Any = jnp.float32


def of_optax(optim: Any) -> Side:
    """optax called directly, without this package's interface."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Side(optim.init, step)


def ours(optim: eqx_ademamix.AbstractOptimizer[Any], dtype: Any = jnp.float32) -> Side:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    return Side(lambda params: eqx_ademamix.init(optim, params), step, dtype)


def _ademamix(**kwargs: Any) -> AdEMAMix:
    return AdEMAMix(LEARNING_RATE, **SETTINGS, **kwargs)


def _simplified() -> SimplifiedAdEMAMix:
    return SimplifiedAdEMAMix(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


# Functions, so that nothing is made before it is measured.
SIDES: dict[str, Callable[[], Side]] = {
    cases.BASELINE: lambda: of_optax(optax.contrib.ademamix(LEARNING_RATE, **SETTINGS)),
    cases.FLOAT32: lambda: ours(_ademamix()),
    cases.HALF: lambda: ours(_ademamix(state_format=StateFormat.half())),
    cases.COMPACT: lambda: ours(_ademamix(state_format=StateFormat.compact())),
    cases.NO_M1: lambda: ours(_ademamix(b1=0.0)),
    cases.SIMPLIFIED: lambda: ours(_simplified()),
    cases.COMPENSATED: lambda: ours(Compensated(_ademamix()), jnp.bfloat16),
    cases.ADAMW: lambda: of_optax(
        optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    ),
}


#
# Compiling
#


class Built(NamedTuple):
    """A compiled step, and the seconds of each phase."""

    compiled: Any
    seconds: dict[str, float]


def build(step: Callable[..., Any], *args: Any) -> Built:
    """Traces, lowers, and compiles."""
    jitted: Any = jax.jit(step, donate_argnums=(0, 1))
    times = [time.perf_counter()]
    # Before JAX 0.4.33, `lower` traces.
    traced = jitted.trace(*args) if hasattr(jitted, "trace") else None
    times.append(time.perf_counter())
    lowered = jitted.lower(*args) if traced is None else traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    phases = ("trace", "lower", "compile")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(phases)}
    seconds["trace + lower"] = times[2] - times[0]
    seconds["all"] = times[3] - times[0]
    return Built(compiled, seconds)


def num_instructions(text: str) -> int:
    """The number of instructions in the text of an HLO module."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


#
# Running
#


class JaxRun:
    """A compiled step that donates its parameters and its state."""

    facts: dict[str, float]

    def __init__(self, side: Side, grads: Tree):
        params = jax.tree.map(jnp.array, grads)  # a copy, which is donated
        state = side.init(params)
        built = build(side.step, params, state, grads)
        self._compiled, self._grads = built.compiled, grads
        self._carry = params, state
        self.seconds = built.seconds
        self.facts = _facts(built, params, grads, state)

    def __call__(self) -> None:
        self._carry = self._compiled(*self._carry, self._grads)

    def wait(self) -> None:
        jax.block_until_ready(self._carry)


def _facts(built: Built, params: Any, grads: Any, state: Any) -> dict[str, float]:
    """What does not change from round to round. Bytes are per parameter."""
    memory = built.compiled.memory_analysis()
    return {
        "state": num_bytes(state) / count(params),
        "temporaries": memory.temp_size_in_bytes / count(params),
        "moved": moved_bytes(params, grads, state) / count(params),
        **built.seconds,
    }
