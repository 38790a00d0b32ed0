"""Tracing, lowering, and compiling a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .cases import CompileCase
from .measure import Sample
from .sides import SIDES, Side, build, num_instructions


ENTRIES = (32, 256)  # of a leaf: enough for `compact` to encode it


def shapes(leaves: int) -> Any:
    return {
        f"layer{i}": jax.ShapeDtypeStruct(ENTRIES, jnp.float32) for i in range(leaves)
    }


def bench_compile(case: CompileCase, in_turn: Any) -> None:
    facts: dict[str, dict[str, float]] = {name: {} for name in case.sides}
    samplers = {
        name: sampler(SIDES[name](), case.leaves, facts[name]) for name in case.sides
    }
    warm_up(case)
    in_turn(samplers, rounds=case.rounds, facts=facts)


def warm_up(case: CompileCase) -> None:
    """The first trace of a process imports modules."""
    for name in case.sides:
        sampler(SIDES[name](), 1, {})()


def sampler(side: Side, leaves: int, facts: dict[str, float]) -> Callable[[], Sample]:
    params = shapes(leaves)
    state = jax.eval_shape(side.init, params)

    def sample() -> Sample:
        jax.clear_caches()  # of an earlier round
        built = build(side.step, params, state, params)
        facts["instructions"] = num_instructions(built.compiled.as_text())
        return built.seconds

    return sample
