"""A float64 reference in NumPy, test models, and functions to compare trees."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from eqx_ademamix import StateFormat, alpha_scheduler, beta3_scheduler


SCHEDULES: Any = dict(
    b3=beta3_scheduler(0.999, 0.9, warmup=10), alpha=alpha_scheduler(5.0, warmup=10)
)


# Whether this jax has what `Offloaded` needs.
HAS_HOST_MEMORY = jax.__version_info__ >= (0, 10, 2)


def x64() -> Any:
    """A context with 64-bit types enabled."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax import experimental  # before JAX 0.8

    return getattr(experimental, "enable_x64")()  # noqa: B009


def compiled_programs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names of the functions compiled in `jax.log_compiles()`."""
    return re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)


#
# The reference: arXiv:2409.03137, Algorithm 1, on one array, in float64
#


class Reference(NamedTuple):
    """One parameter and its moments."""

    p: np.ndarray
    m1: np.ndarray
    m2: np.ndarray
    nu: np.ndarray


def reference_init(p: Any) -> Reference:
    p = np.asarray(p)
    p = p.astype(np.complex128 if np.iscomplexobj(p) else np.float64)
    return Reference(p, np.zeros_like(p), np.zeros_like(p), np.zeros(p.shape))


def reference_step(
    ref: Reference,
    g: Any,
    t: int,
    *,
    lr: float,
    b1: float,
    b2: float,
    b3: float,
    alpha: float,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
) -> Reference:
    """Computes step number `t`, counted from 1."""
    g = np.asarray(g).astype(ref.p.dtype)
    m1 = b1 * ref.m1 + (1 - b1) * g
    m2 = b3 * ref.m2 + (1 - b3) * g
    nu = b2 * ref.nu + (1 - b2) * np.abs(g) ** 2
    direction = (m1 / (1 - b1**t) + alpha * m2) / (
        np.sqrt(nu / (1 - b2**t) + eps_root) + eps
    )
    return Reference(ref.p - lr * (direction + weight_decay * ref.p), m1, m2, nu)


def reference_alpha(t: int, alpha: float, warmup: int) -> float:
    return min(t / warmup, 1.0) * alpha


def reference_b3(t: int, b3: float, start: float, warmup: int) -> float:
    """The schedule exactly as printed in Section 3 of the paper."""
    log_start, log_end = np.log(start), np.log(b3)
    mix = (1 - t / warmup) * log_end + t / warmup * log_start
    return min(np.exp(log_start * log_end / mix), b3) if t < warmup else b3


#
# Trees
#


def tree_type(tree: Any) -> Any:
    """Everything in a tree except its values: structure, shapes, dtypes, weak types."""
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, [
        (x.shape, x.dtype, x.weak_type) if isinstance(x, jax.Array) else x
        for x in leaves
    ]


def max_error(x: Any, reference: Any) -> float:
    """The largest deviation, relative to the largest entry of the reference."""
    x, reference = np.asarray(x), np.asarray(reference)
    assert x.shape == reference.shape
    if x.size == 0:
        return 0.0
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    scale = np.max(np.abs(reference))
    return float(np.max(np.abs(x - reference)) / (scale if scale > 0 else 1.0))


def assert_trees_close(x: Any, y: Any, tolerance: float) -> None:
    """Asserts equal types. Each leaf must be close, relative to its largest entry."""
    assert tree_type(x) == tree_type(y)
    for (path, a), b in zip(
        jtu.tree_leaves_with_path(x), jtu.tree_leaves(y), strict=True
    ):
        if eqx.is_array(a):
            assert max_error(a, b) <= tolerance, jtu.keystr(path)


def buffers(tree: Any) -> list[int]:
    """The addresses of all nonempty arrays in a tree."""
    return [x.unsafe_buffer_pointer() for x in jtu.tree_leaves(tree) if x.size]


def count_traces(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[None]]:
    """Returns `fn`, and a list that grows by one entry each time `fn` is traced."""
    traces: list[None] = []

    def counted(*args: Any) -> Any:
        traces.append(None)
        return fn(*args)

    return counted, traces


#
# Formats
#


def everywhere(fmt: StateFormat) -> StateFormat:
    """The same format for arrays of any size."""
    return StateFormat(fmt.m1, fmt.m2, fmt.nu, min_size=0)


COMPACT = everywhere(StateFormat.compact())


#
# Models
#


class Zoo(eqx.Module):
    """A model with one of everything that an Equinox model can contain."""

    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv2d
    batch_norm: eqx.nn.BatchNorm
    shared: eqx.nn.Shared
    dropout: eqx.nn.Dropout
    scale: jax.Array
    steps: jax.Array
    flags: tuple[bool, int, str, None]
    function: Callable[..., Any]
    name: str = eqx.field(static=True)

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.mlp = eqx.nn.MLP(3, 3, 4, 1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(3)
        self.conv = eqx.nn.Conv2d(1, 2, 3, key=keys[1])
        # Equinox 0.12 added `mode`, and warns if it is missing.
        has_mode = "mode" in inspect.signature(eqx.nn.BatchNorm.__init__).parameters
        mode: Any = {"mode": "batch"} if has_mode else {}
        self.batch_norm = eqx.nn.BatchNorm(3, axis_name="batch", **mode)
        embedding = eqx.nn.Embedding(5, 3, key=keys[2])
        head = eqx.nn.Linear(3, 5, use_bias=False, key=keys[3])
        self.shared = eqx.nn.Shared(
            (embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )
        self.dropout = eqx.nn.Dropout(0.5)
        self.scale = jnp.ones(3)
        self.steps = jnp.zeros((), jnp.int32)
        self.flags = (True, 3, "text", None)
        self.function = jnp.tanh
        self.name = "zoo"


def make_zoo(key: jax.Array) -> Zoo:
    return eqx.nn.make_with_state(Zoo)(key)[0]


def loss_of_arrays(model: Any) -> jax.Array:
    """A loss with a gradient at every inexact array of any model."""
    arrays = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return jnp.sum(jnp.stack([jnp.sum(jnp.sin(x)).astype(float) for x in arrays]))


def make_mlp(seed: int = 0) -> eqx.nn.MLP:
    return eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(seed))
