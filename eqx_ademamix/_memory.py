"""Arrays in host memory, and the order in which a program reads them."""

from collections.abc import Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree


# JAX's name for host memory that a device can read and write directly.
HOST = "pinned_host"
# Since this version, what a compiled program moves there stays there on all backends.
# Before it, all results of a program on a CPU were in device memory.
_SINCE = (0, 10, 2)
Tree = TypeVar("Tree")


def check_host_memory(arrays: Iterable[object]) -> None:
    """Checks that JAX can keep arrays in host memory alongside these arrays."""
    if jax.__version_info__ < _SINCE:
        raise ValueError(
            f"`Offloaded` needs jax {'.'.join(map(str, _SINCE))} or newer, but this is "
            f"jax {jax.__version__}, which cannot keep the results of a jitted step in "
            f"`{HOST}` memory on every backend. Install a newer jax, or use the "
            "wrapped optimizer by itself."
        )
    device = _device_of(arrays)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"`Offloaded` needs `{HOST}` memory, but the device {device} has only "
            f"{', '.join(kinds)}. Use the wrapped optimizer by itself there."
        )


def _device_of(arrays: Iterable[object]) -> Any:  # `jax.Device` is not a static type
    """A device of this process that holds the arrays, or on which JAX would put
    them."""
    known = (
        x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    )
    devices = (device for x in known for device in x.sharding.addressable_devices)
    return next(devices, None) or jax.local_devices()[0]


def is_in_host(x: object) -> bool:
    """Whether an array, concrete or traced, is in host memory. Before JAX 0.7, the
    type of a traced array does not say so."""
    space = getattr(getattr(x, "aval", None), "memory_space", None)
    return getattr(space, "name", None) == "Host"


def any_in_host(tree: PyTree) -> bool:
    return any(map(is_in_host, jtu.tree_leaves(tree)))


def to_host(tree: Tree) -> Tree:
    """A tree with its arrays in host memory. Those already there stay as they are:
    `jax.device_put` would copy them."""
    return jax.tree.map(lambda x: x if is_in_host(x) else _moved(x, "Host"), tree)


def to_device(tree: Tree) -> Tree:
    """A tree with its arrays in device memory."""
    return jax.tree.map(lambda x: _moved(x, "Device") if is_in_host(x) else x, tree)


def _moved(x: Any, target: str) -> Array:
    # `jax.memory` is not in all versions. With `src`, derivatives move back.
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    there, here = (host, device) if target == "Host" else (device, host)
    return jax.device_put(x, there, src=here)


def placed_as(tree: Tree, like: PyTree) -> Tree:
    """A tree whose arrays are in host memory wherever those of another tree of
    the same structure are."""
    put = lambda x, y: to_host(x) if is_in_host(y) else x
    return jax.tree.map(put, tree, like)


def after(done: Any, waiting: Tree) -> tuple[Any, Tree]:
    """The same trees, but a compiled program can read the arrays of `waiting` that are
    in host memory only after those of `done` that belong there are back."""
    host, rest = eqx.partition((done, waiting), is_in_host)
    arrays = jtu.tree_leaves(host)
    is_traced = any(isinstance(x, Tracer) for x in arrays)
    # Inside `jax.shard_map`, a barrier would make arrays that are equal on all devices,
    # such as a bias, vary as a split weight does.
    if not is_traced or len({varying_axes(x) for x in arrays}) > 1:
        return done, waiting
    return eqx.combine(_barrier(host), rest)


def varying_axes(x: Array) -> frozenset[str]:
    """The axes over which an array inside `jax.shard_map` varies, if JAX knows them."""
    aval = getattr(x, "aval", None)
    axes = getattr(aval, "vma", None)  # replaced by `mat` in later versions
    return getattr(getattr(aval, "mat", None), "varying", axes) or frozenset()


@jax.custom_jvp
def _barrier(tree: Tree) -> Tree:
    return jax.lax.optimization_barrier(tree)


@_barrier.defjvp
def _barrier_jvp(primals: tuple[Tree], tangents: tuple[Tree]) -> tuple[Tree, Tree]:
    """Derivatives need not wait, but each must be in the same memory as its array. JAX
    does not put zero derivatives there."""
    is_zero = lambda x: x.dtype == jax.dtypes.float0  # of integers
    put = lambda x: x if is_zero(x) else to_host(x)
    return _barrier(*primals), jax.tree.map(put, tangents[0])
