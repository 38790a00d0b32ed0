"""From the PyTorch implementations."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._ademamix import AdEMAMix, AdEMAMixState
from ._checks import check_optimizer, describe, no_type_check


Name: TypeAlias = str | int
Names: TypeAlias = Mapping[str, Name | tuple[Name, Callable[[Any], Any]]]

# What the implementations call m1, m2 and nu. bitsandbytes stacks m1 and m2.
_KEYS = (
    ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),  # Apple
    ("exp_avg", "exp_avg_slow", "exp_avg_sq"),  # pytorch_optimizer
)
_STACKED = ("state1", "state2")  # bitsandbytes


@no_type_check
def from_torch(
    state_dict: Mapping[str, Any], optim: AdEMAMix, params: PyTree[Any], names: Names
) -> AdEMAMixState:
    """Takes a run of a PyTorch AdEMAMix over: Apple's, that of `pytorch_optimizer`, or
    the 32-bit one of bitsandbytes.

    PyTorch counts steps from 1, so the schedules of `optim` should have `offset=1`.
    PyTorch itself is not needed.

    **Arguments:**

    - `state_dict`: what `optimizer.state_dict()` gave, its tensors made NumPy arrays.
    - `optim`: the optimizer that goes on.
    - `params`: the model.
    - `names`: for each trained leaf of `params` its path, as error messages print it
        after the tree's name (`.layers[0].weight`), mapped to the parameter's name or
        index in the state dict; or to a pair of that and a function that is applied to
        each of its moments, for example `numpy.transpose`.

    **Returns:**

    The state of `optim`, in its own format, on the default device.

    **Raises:**

    - `ValueError`: if a path has no name, a parameter no moments, a moment another
        shape, or the numbers of steps disagree.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import numpy as np
        import eqx_ademamix

        model = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0))
        zeros = np.zeros((2, 3), np.float32)
        moments = {"exp_avg_fast": zeros, "exp_avg_slow": zeros, "exp_avg_sq": zeros}
        state_dict = {"state": {0: {"step": 100, **moments}}, "param_groups": []}
        state = eqx_ademamix.from_torch(
            state_dict, eqx_ademamix.AdEMAMix(1e-3), model, names={".weight": 0}
        )
        assert state.count == state.count_m2 == 100
        ```
    """
    check_optimizer(optim, AdEMAMix)
    if "state" not in state_dict:
        raise ValueError(
            f"`state_dict` is {describe(state_dict)}, but a PyTorch optimizer's "
            "`state_dict()` has the keys 'state' and 'param_groups'."
        )
    blank = optim.init(params)
    leaves, treedef = jtu.tree_flatten_with_path(blank.nu)
    found = [_read(state_dict, names, jtu.keystr(path), x.shape) for path, x in leaves]

    def tree(name: str, like: Any) -> Any:
        moments = treedef.unflatten([getattr(x, name) for x in found])
        return jax.tree.map(lambda own, x: jnp.array(x, own.dtype), like, moments)

    has_m1 = bool(jtu.tree_leaves(blank.m1))
    return AdEMAMixState(
        count=jnp.asarray(_steps(found), jnp.int32),
        count_m2=jnp.asarray(_steps(found), jnp.int32),
        m1=tree("m1", blank.m1) if has_m1 else blank.m1,
        m2=tree("m2", blank.m2),
        nu=tree("nu", blank.nu),
    )


class _Found(NamedTuple):
    """What a state dict says of one parameter."""

    m1: Any
    m2: Any
    nu: Any
    step: int


def _read(state_dict: Any, names: Names, path: str, shape: tuple[int, ...]) -> _Found:
    name, fn = _name(names, path)
    index, group = _index(state_dict, name)
    state = state_dict["state"].get(index)
    if state is None:
        known = ", ".join(map(repr, list(state_dict["state"])[:8]))
        raise ValueError(
            f"names[{path!r}] is {name!r}, but `state_dict` has no state of that name "
            f"or index. It has those of {known or 'nothing'}."
        )
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError(
            f"params{path}: `state_dict` has no 'step' for {name!r}, neither in its "
            "state nor in its group. Which optimizer wrote it?"
        )
    moments = [_moment(f"params{path}", x, fn, shape) for x in _moments(state, path)]
    return _Found(*moments, step=int(np.asarray(step)))


def _name(names: Names, path: str) -> tuple[Name, Callable[[Any], Any]]:
    entry = names.get(path, names.get(path.removeprefix(".")))
    if entry is None:
        raise ValueError(
            f"`names` has no entry for params{path}, which is trained. Give it the "
            f"parameter's name or index in the state dict: {{{path!r}: ...}}."
        )
    return entry if isinstance(entry, tuple) else (entry, lambda x: x)


def _index(state_dict: Any, name: Name) -> tuple[Name, Mapping[str, Any]]:
    """The key of a parameter's state, and its group. PyTorch counts parameters over all
    groups and may keep their names beside the numbers."""
    for group in state_dict.get("param_groups", ()):
        indices = list(group.get("params", ()))
        by_name = dict(zip(group.get("param_names", ()), indices, strict=False))
        index = by_name.get(name, name)
        if index in indices:
            return index, group
    return name, {}


def _moments(state: Mapping[str, Any], path: str) -> tuple[Any, Any, Any]:
    """`m1` (`None` at `b1 = 0`), `m2` and `nu`."""
    if all(key in state for key in _STACKED):
        stacked, nu = (state[key] for key in _STACKED)
        return stacked[0], stacked[1], nu
    for keys in _KEYS:
        if all(key in state for key in keys):
            m1, m2, nu = (state[key] for key in keys)
            return m1, m2, nu
    found = ", ".join(map(str, state))
    raise ValueError(
        f"params{path}: a moment is missing. The state dict has {found or 'nothing'} "
        "for it, but exp_avg_fast (or exp_avg), exp_avg_slow and exp_avg_sq, or state1 "
        "and state2, were expected."
    )


def _moment(
    where: str, x: Any, fn: Callable[[Any], Any], shape: tuple[int, ...]
) -> Any:
    if x is None:  # Apple's at `b1 = 0`, where the next step does not read it
        return np.zeros(shape, np.float32)
    moment = np.asarray(fn(np.asarray(x)))
    if moment.dtype == np.uint8:
        raise ValueError(
            f"{where} has moments in 8 bits in the state dict, but only the 32-bit "
            "optimizer of bitsandbytes can be read. Train a step with `optim_bits=32`."
        )
    if moment.shape != shape:
        raise ValueError(
            f"{where} has shape {shape}, but its moment in the state dict has "
            f"{moment.shape}. Map the path to a pair `(name, function)`, for example "
            "with `numpy.transpose`."
        )
    return moment


def _steps(found: list[_Found]) -> int:
    steps = {x.step for x in found}
    if len(steps) > 1:
        raise ValueError(
            f"`state_dict` has parameters after different numbers of steps, "
            f"{sorted(steps)}, but one number was expected for all. Were some of them "
            "frozen for a while?"
        )
    return steps.pop() if steps else 0
