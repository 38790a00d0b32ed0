"""From the PyTorch implementations."""

import functools as ft
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast, overload

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .._optimizer import AbstractOptimizer, OptaxOptimizer, State
from .._paths import Path, describe, path_text, shortened
from .._state import AdEMAMixState
from .._storage.codec import Stored, is_encoded
from .._typing import no_type_check
from .adopt import in_format
from .target import blank_state, continued
from .weights import weight_after


Name: TypeAlias = str | int
Convert: TypeAlias = Callable[[np.ndarray], np.ndarray]
Names: TypeAlias = Mapping[str, Name | tuple[Name, Convert]]
# The state dict, or a part of it. Its contents are whatever PyTorch put there.
StateDict: TypeAlias = Mapping[Any, Any]

# What the implementations call m1, m2 and nu. bitsandbytes stacks m1 and m2.
_KEYS = (
    ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),  # Apple
    ("exp_avg", "exp_avg_slow", "exp_avg_sq"),  # pytorch_optimizer
)
_STACKED = ("state1", "state2")  # bitsandbytes


@overload
def from_torch(
    state_dict: StateDict,
    optim: AbstractOptimizer[State],
    params: PyTree,
    names: Names,
) -> State: ...
@overload
def from_torch(
    state_dict: StateDict, optim: OptaxOptimizer, params: PyTree, names: Names
) -> Any: ...
@no_type_check
def from_torch(
    state_dict: StateDict,
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    params: PyTree,
    names: Names,
) -> Any:
    """Moves a run of a PyTorch AdEMAMix to this package: Apple's, the one in
    `pytorch_optimizer`, or the 32-bit one in bitsandbytes.

    PyTorch counts steps from 1, so the schedules of `optim` should have `offset=1`. You
    do not need PyTorch itself.

    **Arguments:**

    - `state_dict`: what `optimizer.state_dict()` returned, with its tensors converted
        to NumPy arrays.
    - `optim`: the optimizer that continues the run: an [`eqx_ademamix.AdEMAMix`][], an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][] around it, or an
        optax optimizer such as `optax.chain(...)` that contains exactly one `AdEMAMix`.
    - `params`: the model.
    - `names`: a mapping from the path of each trained leaf of `params`, as error
        messages print it (`.layers[0].weight`, with or without `params` before it), to
        the parameter's name or index in the state dict, or to a pair of that and a
        function to apply to each of its moments, for example `numpy.transpose`.

    **Returns:**

    The state of `optim`, in its own format, with the shardings of the parameters. The
    optax schedules in `optim` continue after the steps that were taken.

    **Raises:**

    - `ValueError`: if a path has no name, if a parameter has no moments, if a moment
        has another shape or illegal values (such as NaN, or a negative `nu`), or if the
        numbers of steps differ.

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
    blank_tree, blank = blank_state(optim, params, AdEMAMixState)
    _check_kinds(state_dict, names)
    leaves, treedef = jtu.tree_flatten_with_path(blank.m2, is_leaf=is_encoded)
    has_m1 = bool(jtu.tree_leaves(blank.m1))
    found = [_read(state_dict, names, path, x, has_m1) for path, x in leaves]

    def tree(name: str, like: PyTree) -> PyTree:
        moments = treedef.unflatten([getattr(x, name) for x in found])
        stored = ft.partial(_on_devices_of, name)
        return jtu.tree_map_with_path(stored, like, moments, is_leaf=is_encoded)

    count, count_m2 = (jnp.asarray(_steps(found), jnp.int32) for _ in range(2))
    ours = AdEMAMixState(
        count=count,
        count_m2=count_m2,
        m1=tree("m1", blank.m1) if has_m1 else blank.m1,
        m2=tree("m2", blank.m2),
        nu=tree("nu", blank.nu),
        m2_weight=weight_after(blank, optim, "m2_weight", count_m2),
        m1_weight=weight_after(blank, optim, "m1_weight", count),
        nu_weight=weight_after(blank, optim, "nu_weight", count),
        skipped=blank.skipped,
    )
    return continued(blank_tree, ours, None)


def _on_devices_of(name: str, path: Path, own: Stored, x: np.ndarray) -> Stored:
    where = f"params{path_text(path)}: the moment `{name}`"
    return jax.tree.map(_put, in_format(where, x, own, is_square=name == "nu"), own)


def _put(x: Array, like: Array) -> Array:
    return x if isinstance(like, Tracer) else jax.device_put(x, like.sharding)


def _check_kinds(state_dict: Any, names: object) -> None:
    has_state = isinstance(state_dict, Mapping) and "state" in state_dict
    if not (has_state and isinstance(state_dict["state"], Mapping)):
        raise ValueError(
            f"`state_dict` is {describe(state_dict)}, but a PyTorch optimizer's "
            "`state_dict()` has the keys 'state' and 'param_groups'."
        )
    _check_groups(state_dict.get("param_groups", []))
    if not isinstance(names, Mapping):
        raise TypeError(
            f"`names` is {describe(names)}, but a dict was expected, from the path of "
            "each trained leaf to the parameter's name or index in the state dict."
        )


def _check_groups(groups: object) -> None:
    _check_part("", groups, list, "a list")
    for i, group in enumerate(cast("list[Any]", groups)):
        _check_part(f"[{i}]", group, Mapping, "a dict")
        for key, default in (("params", None), ("param_names", [])):
            _check_part(f"[{i}][{key!r}]", group.get(key, default), list, "a list")


def _check_part(place: str, found: object, kind: type, expected: str) -> None:
    if not isinstance(found, kind) and not (kind is list and isinstance(found, tuple)):
        raise ValueError(
            f"state_dict['param_groups']{place} is {describe(found)}, but {expected} "
            "was expected. Pass what `optimizer.state_dict()` of PyTorch returned."
        )


class _Found(NamedTuple):
    """What a state dict has for one parameter."""

    m1: np.ndarray | None  # `None` where the optimizer does not store it
    m2: np.ndarray
    nu: np.ndarray
    step: int


def _read(
    state_dict: StateDict, names: Names, path: Path, like: Stored, has_m1: bool
) -> _Found:
    where = f"params{path_text(path)}"
    name, fn = _name(names, path, where)
    index, group = _index(state_dict, name)
    state = state_dict["state"].get(index)
    if not isinstance(state, Mapping):
        known = ", ".join(map(repr, list(state_dict["state"])[:8]))
        raise ValueError(
            f"{where} is mapped to {shortened(repr(name), 60)}, but `state_dict` has "
            "no state of that name or index. It has those of "
            f"{shortened(known, 200) or 'nothing'}."
        )
    state = {**state, **_quant_state(state, where)}
    m1, m2, nu = _moments(state, where)
    return _Found(
        m1=_moment(where, "m1", m1, fn, like) if has_m1 else None,
        m2=_moment(where, "m2", m2, fn, like),
        nu=_moment(where, "nu", nu, fn, like),
        step=_step(where, state, group),
    )


def _quant_state(state: StateDict, where: str) -> StateDict:
    """Where newer versions of bitsandbytes keep what must not be cast."""
    found = state.get("__bnb_optimizer_quant_state__", {})
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{where}: its '__bnb_optimizer_quant_state__' in the state dict is "
            f"{describe(found)}, but a dict was expected. Keep what bitsandbytes wrote "
            "there, and convert its tensors with `tensor.cpu().numpy()`."
        )
    return found


def _name(names: Names, path: Path, where: str) -> tuple[Name, Convert]:
    text = jtu.keystr(path)
    keys = (text, text.removeprefix("."), f"params{text}")
    entry = next((names[key] for key in keys if key in names), None)
    if entry is None:
        raise ValueError(
            f"`names` has no entry for {where}, which is trained. Give it the "
            "parameter's name or index in the state dict, by the path without the word "
            "`params`."
        )
    name, fn = entry if type(entry) is tuple and len(entry) == 2 else (entry, None)
    if not isinstance(name, str | int | np.integer) or not (fn is None or callable(fn)):
        raise TypeError(
            f"`names` has {describe(entry)} for {where}, but a name, an index, or a "
            "pair (name or index, function) was expected."
        )
    return name, fn or (lambda x: x)


def _index(state_dict: StateDict, name: Name) -> tuple[Name, StateDict]:
    """The key of a parameter's state, and its group. PyTorch numbers the parameters of
    all groups together, and may store their names alongside the numbers."""
    for group in state_dict.get("param_groups", ()):
        indices = list(group["params"])
        by_name = dict(zip(group.get("param_names", ()), indices, strict=False))
        index = by_name.get(name, name)
        if index in indices:
            return index, group
    return name, {}


def _moments(state: StateDict, where: str) -> tuple[Any, Any, Any]:
    """`m1` (`None` at `b1 = 0`), `m2` and `nu`."""
    if all(key in state for key in _STACKED):
        stacked, nu = (state[key] for key in _STACKED)
        stacked = _numbers(where, "the moment `state1` in the state dict", stacked)
        if stacked.shape[:1] == (2,):
            return stacked[0], stacked[1], nu
    for keys in _KEYS:
        if all(key in state for key in keys):
            m1, m2, nu = (state[key] for key in keys)
            return m1, m2, nu
    found = shortened(", ".join(map(str, state)), 120)
    raise ValueError(
        f"{where}: a moment is missing. The state dict has {found or 'nothing'} for "
        "it, but exp_avg_fast (or exp_avg), exp_avg_slow and exp_avg_sq, or state1 "
        "(two moments, stacked) and state2, were expected."
    )


def _moment(where: str, name: str, x: object, fn: Convert, like: Stored) -> np.ndarray:
    if x is None:
        raise ValueError(
            f"{where}: the moment `{name}` is missing: it is None in the state dict. "
            "An `m1` may be None only for an optimizer with `b1=0`."
        )
    x = _numbers(where, f"the moment `{name}` in the state dict", x)
    moment = _numbers(where, f"the moment `{name}` after its function", fn(x))
    if moment.dtype == np.uint8:
        raise ValueError(
            f"{where} has moments in 8 bits in the state dict, but only the 32-bit "
            "optimizer of bitsandbytes can be read. Train a step with `optim_bits=32`."
        )
    if moment.shape != like.shape:
        raise ValueError(
            f"{where} has shape {like.shape}, but its moment in the state dict has "
            f"{moment.shape}. Map the path to a pair `(name, function)`, for example "
            "with `numpy.transpose`."
        )
    is_complex = name != "nu" and np.issubdtype(like.dtype, np.complexfloating)
    if np.iscomplexobj(moment) != is_complex:
        expected = "complex" if is_complex else "real"
        raise ValueError(
            f"{where}: the moment `{name}` has dtype {moment.dtype} in the state dict, "
            f"but {expected} numbers were expected. Is it the state of another model?"
        )
    return moment


def _numbers(where: str, what: str, x: object) -> np.ndarray:
    array = _array(x)
    if array is None or not jnp.issubdtype(array.dtype, np.number):
        raise ValueError(
            f"{where}: {what} is {describe(x)}, but an array of numbers was expected. "
            "Convert each tensor with `tensor.cpu().numpy()`."
        )
    return array


def _array(x: object) -> np.ndarray | None:
    """`None` if NumPy cannot make an array of it, such as lists of unequal lengths."""
    try:
        return np.asarray(x)
    except (TypeError, ValueError):
        return None


def _step(where: str, state: StateDict, group: StateDict) -> int:
    steps = [x for x in (state.get("step"), group.get("step")) if x is not None]
    if not steps:
        raise ValueError(
            f"{where}: `state_dict` has no 'step' for it, neither in its state nor in "
            "its group. Which optimizer wrote it?"
        )
    step = _array(steps[0])
    if step is None or not _is_count(step):
        raise ValueError(
            f"{where}: its 'step' in the state dict is {describe(steps[0])}, but a "
            "number of steps was expected."
        )
    return int(step.item())


def _is_count(step: np.ndarray) -> bool:
    is_number = step.size == 1 and step.dtype.kind in "iuf"
    return is_number and 0 <= step.item() < 2**31 and step.item() == int(step.item())


def _steps(found: list[_Found]) -> int:
    steps = sorted({x.step for x in found})
    if len(steps) > 1:
        raise ValueError(
            "`state_dict` has parameters after different numbers of steps, "
            f"{shortened(str(steps), 100)}, but one number was expected for all. Were "
            "some of them frozen for part of the run?"
        )
    return steps[0] if steps else 0
