"""The best that the machine can do, measured alongside the optimizers."""

import ctypes
import functools as ft
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .measure import Absent


WORDS = 9  # p, g, m1, m2, nu are read, and p, m1, m2, nu are written


class InPlaceScale:
    """`x * c` in place, on an array long enough to move nine words per parameter.

    Each entry is read and written once, so the array has 9/2 entries per parameter.
    """

    def __init__(self, parameters: int):
        self._x = jnp.ones(WORDS * parameters // 2)
        scale: Any = jax.jit(lambda x: x * jnp.float32(1.0001), donate_argnums=0)
        self._scale = scale.lower(self._x).compile()
        self.bytes = 2 * self._x.size * self._x.dtype.itemsize
        self.facts = {"moved": self.bytes / parameters}

    def __call__(self) -> None:
        self._x = self._scale(self._x)

    def wait(self) -> None:
        self._x.block_until_ready()


# One pass over memory, with the arithmetic of Algorithm 1 in float32.
SOURCE = """
#include <math.h>

void step(long n, float *p, const float *g, float *m1, float *m2, float *nu,
          float rate, float a1, float a2, float a3, float alpha, float c1, float c2,
          float eps, float decay) {
  PARALLEL
  for (long i = 0; i < n; i++) {
    float x = g[i];
    m1[i] += a1 * (x - m1[i]);
    m2[i] += a3 * (x - m2[i]);
    nu[i] += a2 * (x * x - nu[i]);
    float top = m1[i] * c1 + alpha * m2[i];
    p[i] -= rate * (top / (sqrtf(nu[i] * c2) + eps) + decay * p[i]);
  }
}
"""
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
PARALLEL = '_Pragma("omp parallel for simd schedule(static)")'


@ft.cache
def library() -> Any:
    """The compiled loop, with threads if the compiler has OpenMP."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Absent("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for extra in (("-fopenmp", f"-DPARALLEL={PARALLEL}"), ("-DPARALLEL=",)):
            if _compile(compiler, path, extra):
                return ctypes.CDLL(str(path / "step.so"))
    raise Absent("the C compiler does not compile the loop")


def _compile(compiler: str, path: Path, extra: tuple[str, ...]) -> bool:
    (path / "step.c").write_text(SOURCE)
    files = ("-shared", "-fPIC", "-o", "step.so", "step.c", "-lm")
    done = subprocess.run(
        (compiler, *FLAGS, *extra, *files), cwd=path, capture_output=True
    )
    return done.returncode == 0


class CLoop:
    """AdEMAMix in float32 as a loop in C, compiled when it is first used."""

    def __init__(self, grads: Any, rate=1e-3, alpha=5.0, weight_decay=0.1):
        self._step = library().step
        self.grads = np.ascontiguousarray(grads, np.float32)
        self.p, self.m1, self.m2, self.nu = (
            np.zeros(self.grads.size, np.float32) for _ in range(4)
        )
        self.count = 0
        self._rate, self._alpha, self._decay = rate, alpha, weight_decay
        self.facts = {"state": 12.0, "temporaries": 0.0, "moved": 4.0 * WORDS}

    @classmethod
    def on(cls, tree: Any) -> "CLoop":
        """All leaves as one array."""
        return cls(np.concatenate([np.ravel(x) for x in tree.values()]))

    def __call__(self) -> None:
        self.count += 1
        arrays = (self.p, self.grads, self.m1, self.m2, self.nu)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in arrays]
        numbers = [ctypes.c_float(x) for x in self._numbers()]
        self._step(ctypes.c_long(self.p.size), *pointers, *numbers)

    def _numbers(self) -> tuple[float, ...]:
        b1, b2, b3 = 0.9, 0.999, 0.9999
        corrections = (1 / -math.expm1(self.count * math.log(b)) for b in (b1, b2))
        averages = 1 - b1, 1 - b2, 1 - b3
        return self._rate, *averages, self._alpha, *corrections, 1e-8, self._decay

    def wait(self) -> None:
        """The loop has ended when the call returns."""
