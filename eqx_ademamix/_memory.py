"""Arrays in the memory of the host, next to that of the device."""

from collections.abc import Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree


# What JAX calls the memory of the host that a device can copy from and to by itself.
HOST = "pinned_host"
# Since this version, what a compiled program moves there stays there on all backends.
# Before it, all results of a program on a CPU were in the memory of the device.
_SINCE = (0, 10, 2)
Tree = TypeVar("Tree")


def check_host_memory(arrays: Iterable[object]) -> None:
    """Checks that JAX can keep arrays in the memory of the host of these arrays."""
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
    """A device of this process on which arrays are, or on which JAX would put them."""
    known = (
        x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    )
    devices = (device for x in known for device in x.sharding.addressable_devices)
    return next(devices, None) or jax.local_devices()[0]


def is_in_host(x: object) -> bool:
    """Whether an array, concrete or traced, is in the memory of the host. Before JAX
    0.7, traced arrays do not know their memory."""
    space = getattr(getattr(x, "aval", None), "memory_space", None)
    return getattr(space, "name", None) == "Host"


def any_in_host(tree: PyTree) -> bool:
    return any(map(is_in_host, jtu.tree_leaves(tree)))


def to_host(tree: Tree) -> Tree:
    """A tree with its arrays in the memory of the host. Those that are there already
    stay as they are: `jax.device_put` would copy them."""
    return jax.tree.map(lambda x: x if is_in_host(x) else _moved(x, "Host"), tree)


def to_device(tree: Tree) -> Tree:
    """A tree with its arrays in the memory of the device."""
    return jax.tree.map(lambda x: _moved(x, "Device") if is_in_host(x) else x, tree)


def _moved(x: Any, target: str) -> Array:
    # `jax.memory` is not in all versions. With `src`, derivatives move back.
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    there, here = (host, device) if target == "Host" else (device, host)
    return jax.device_put(x, there, src=here)


def placed_as(tree: Tree, like: PyTree) -> Tree:
    """A tree whose arrays are in the memory of the host where those of a tree of the
    same structure are."""
    put = lambda x, y: to_host(x) if is_in_host(y) else x
    return jax.tree.map(put, tree, like)


def after(done: Any, waiting: Tree) -> tuple[Any, Tree]:
    """The same trees, but a compiled program can read what is in the memory of the host
    in `waiting` only once what belongs there in `done` is back."""
    host, rest = eqx.partition((done, waiting), is_in_host)
    arrays = jtu.tree_leaves(host)
    is_traced = any(isinstance(x, Tracer) for x in arrays)
    # Inside of `jax.shard_map`, a barrier would make arrays that are equal on all
    # devices, such as a bias, vary as a split weight does.
    if not is_traced or len({_axes(x) for x in arrays}) > 1:
        return done, waiting
    return eqx.combine(_barrier(host), rest)


def _axes(x: Array) -> frozenset[str]:
    """The axes over which an array inside of `jax.shard_map` varies."""
    aval = jax.typeof(x)
    axes = getattr(aval, "vma", None)  # replaced by `mat` in later versions
    return getattr(getattr(aval, "mat", None), "varying", axes) or frozenset()


@jax.custom_jvp
def _barrier(tree: Tree) -> Tree:
    return jax.lax.optimization_barrier(tree)


@_barrier.defjvp
def _barrier_jvp(primals: tuple[Tree], tangents: tuple[Tree]) -> tuple[Tree, Tree]:
    """Derivatives need not wait, but must be in the memory of what they belong to, in
    which JAX does not put those that are zero."""
    is_zero = lambda x: x.dtype == jax.dtypes.float0  # of integers
    put = lambda x: x if is_zero(x) else to_host(x)
    return _barrier(*primals), jax.tree.map(put, tangents[0])
