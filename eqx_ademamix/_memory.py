"""Arrays in the memory of the host, next to that of the device."""

from collections.abc import Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree


# What JAX calls the memory of the host from which a device can copy by itself.
HOST = "pinned_host"
# The first version in which arrays that a compiled program moves there stay there on
# every backend. Before, the outputs of a program on a CPU were in device memory again.
_SINCE = (0, 10, 2)
Tree = TypeVar("Tree")


def check_host_memory(arrays: Iterable[object]) -> None:
    """Checks that the device of the arrays has this memory, and JAX can use it."""
    if jax.__version_info__ < _SINCE:
        raise RuntimeError(
            f"`Offloaded` needs jax {'.'.join(map(str, _SINCE))} or newer, which keeps "
            f"arrays in `{HOST}` memory between steps, but this is jax "
            f"{jax.__version__}. Update jax, or use the wrapped optimizer by itself."
        )
    device = _device_of(arrays)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise RuntimeError(
            f"`Offloaded` needs `{HOST}` memory, but the device {device} has only "
            f"{', '.join(kinds)}. Use the wrapped optimizer by itself."
        )


def _device_of(arrays: Iterable[object]) -> jax.Device:
    """A device of this process on which there are arrays, or on which JAX puts them."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            return next(iter(x.sharding.addressable_devices))
    return jax.local_devices()[0]


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
    put = lambda x: x if is_in_host(x) else jax.device_put(x, jax.memory.Space.Host)
    return jax.tree.map(put, tree)


def to_device(tree: Tree) -> Tree:
    """A tree with its arrays in the memory of the device."""
    put = lambda x: jax.device_put(x, jax.memory.Space.Device) if is_in_host(x) else x
    return jax.tree.map(put, tree)


def placed_as(tree: Tree, like: PyTree) -> Tree:
    """A tree whose arrays are in the memory of the host where those of a tree of the
    same structure are."""
    put = lambda x, y: to_host(x) if is_in_host(y) else x
    return jax.tree.map(put, tree, like)


def after(done: Any, waiting: Tree) -> tuple[Any, Tree]:
    """The same trees, but a compiled program can read what is in the memory of the host
    in `waiting` only once what belongs there in `done` is back."""
    host, rest = eqx.partition((done, waiting), is_in_host)
    if not any(isinstance(x, Tracer) for x in jtu.tree_leaves(host)):
        return done, waiting
    return eqx.combine(jax.lax.optimization_barrier(host), rest)
