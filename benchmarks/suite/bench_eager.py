"""A step outside `jit`."""

from typing import Any

import jax
import jax.numpy as jnp

from .cases import EagerCase
from .measure import sampler_of
from .sides import SIDES, Side
from .trees import Tree, normal_tree


ENTRIES = 4096  # of a leaf: enough for `compact` to encode it


class EagerRun:
    """A step without `jit`, always from the same state."""

    facts: dict[str, float]

    def __init__(self, side: Side, params: Tree):
        self.facts = {}
        self._step, self._params = side.step, params
        self._state = side.init(params)

    def __call__(self) -> None:
        self._out = self._step(self._params, self._state, self._params)

    def wait(self) -> None:
        jax.block_until_ready(self._out)


def bench_eager(case: EagerCase, in_turn: Any) -> None:
    params = normal_tree(ENTRIES * case.leaves, case.leaves, jnp.float32)
    runs = {name: EagerRun(SIDES[name](), params) for name in case.sides}
    for run in runs.values():
        run()
        run.wait()
    rounds = 3 if case.leaves < 1000 else 1
    in_turn({name: sampler_of(x, 1) for name, x in runs.items()}, rounds=rounds)
