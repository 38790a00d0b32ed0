"""Hyperparameters: checked if they are concrete, resolved at the counters."""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Real

from ._numerics import Decay, saturated
from ._paths import describe
from ._typing import DType


# What a schedule returns is checked when it is called.
Schedule: TypeAlias = Callable[..., Any]
Scalar: TypeAlias = Float[Array, ""]
HyperParam: TypeAlias = float | Float[Array, ""]
HyperParamOrSchedule: TypeAlias = HyperParam | Schedule
# What is accepted for them.
HyperParamLike: TypeAlias = (
    int | float | np.number[Any] | Real[Array, ""] | Real[np.ndarray, ""]
)
HyperParamLikeOrSchedule: TypeAlias = HyperParamLike | Schedule


class Domain(NamedTuple):
    """The set of legal values of a hyperparameter."""

    contains: Callable[[float], bool]
    text: str
    is_decay: bool = False


finite = Domain(math.isfinite, "a finite number")
positive = Domain(lambda x: 0 < x < np.inf, "a finite number > 0")
non_negative = Domain(lambda x: 0 <= x < np.inf, "a finite number >= 0")
fraction = Domain(lambda x: 0 <= x <= 1, "a number in [0, 1]")
decay = Domain(lambda x: 0 <= x < 1, "a number in [0, 1)", is_decay=True)
# A decay rate that rounds to 1 is legal if a schedule also gives its complement.
_rounded_decay = decay._replace(contains=lambda x: 0 <= x <= 1)
_complement = Domain(lambda x: 0 < x <= 1, "a number in (0, 1]")


def wide(x: jax.typing.ArrayLike) -> Array:
    """`x` in the widest float that is enabled, with a strong type."""
    return jnp.asarray(x).astype(float)


def is_zero(value: HyperParam) -> bool:
    """Whether a hyperparameter is known to be 0."""
    return not isinstance(value, Tracer) and float(value) == 0


def hyperparam(name: str, given: object, domain: Domain) -> HyperParam:
    """Checks a hyperparameter and converts it to a Python float (static under
    `filter_jit`) or to a 0-d array of the default float (traced)."""
    value = real_scalar(name, given, domain.text)
    if domain.is_decay:
        _check_precision(name, value)
    if isinstance(value, Tracer):
        return wide(value)
    is_array = isinstance(value, (np.ndarray, jax.Array))
    number, used = _number(value), _number(value, jnp.result_type(float))
    # What matters is the value as it will be used: 1e39 is infinite in float32, and an
    # array 1 - 1e-9 is 1. But a decay rate that is a Python number is used as
    # `1 - decay`.
    if not domain.contains(number if domain.is_decay and not is_array else used):
        is_rounding = domain.contains(number)
        as_used = f" ({used} in {jnp.result_type(float)})" if is_rounding else ""
        raise ValueError(
            f"`{name}` is {number}{as_used}, but {domain.text} was expected. Pass a "
            "value in that range."
        )
    return wide(value) if is_array else number


def _number(value: HyperParamLike, dtype: DType | None = None) -> float:
    with np.errstate(over="ignore"):
        try:
            return float(np.asarray(value, np.float64).astype(dtype or np.float64))
        except OverflowError:  # of a Python int
            return math.inf


def limit(name: str, value: object) -> HyperParam | None:
    """Checks the limit of a guard. `None` turns the guard off."""
    if value is None:
        return None
    text = f"{positive.text}, or None for no limit,"
    return hyperparam(name, value, positive._replace(text=text))


def resolve_limit(name: str, value: object, count: Array) -> Scalar | None:
    return None if value is None else resolve(name, value, count, positive)


def hyperparam_or_schedule(
    name: str, value: object, domain: Domain
) -> HyperParamOrSchedule:
    return value if callable(value) else hyperparam(name, value, domain)


def resolve(name: str, value: object, count: Array, domain: Domain) -> Scalar:
    """The value of a hyperparameter at a counter: a 0-d array of the widest float."""
    return wide(_at(name, value, count, domain))


def _at(name: str, value: object, count: Array, domain: Domain) -> HyperParamLike:
    """A constant was checked when the optimizer was made. What a schedule returns is
    checked in the same way here, if it is concrete."""
    if callable(value):
        return hyperparam(f"{name}(count)", value(count), domain)
    if domain.is_decay:
        _check_precision(name, value)
    return real_scalar(name, value)


def resolve_decay(name: str, value: object, count: Array) -> tuple[Scalar, Scalar]:
    """A decay rate at a counter, and `1 - decay` from the widest numbers available: in
    float32, cancellation would leave `1 - 0.999999` with only one correct digit."""
    complement = getattr(value, "complement", None)
    if complement is not None:
        rounded = resolve(name, value, count, _rounded_decay)
        return rounded, resolve(f"{name}.complement", complement, count, _complement)
    out = _at(name, value, count, decay)
    return wide(out), wide(1.0 - out if isinstance(out, float) else 1.0 - wide(out))


def decay_complement(name: str, value: object) -> Scalar:
    """`1 - value` for a decay rate that a caller passes directly, checked."""
    checked = hyperparam(name, value, decay)
    return wide(1.0 - checked if isinstance(checked, float) else 1.0 - wide(checked))


_REAL = (int, float, np.integer, np.floating, np.ndarray, jax.Array)


def real_scalar(
    name: str, value: object, expected: str = "a real number"
) -> HyperParamLike:
    """The value, once it is known to be a real number or an array that holds one."""
    is_bool = isinstance(value, (bool, np.bool_))
    if is_bool or not isinstance(value, _REAL):
        raise TypeError(
            f"`{name}` is {describe(value)}, but {expected} was expected: a Python "
            "number or an array of shape ()."
        )
    if not isinstance(value, (np.ndarray, jax.Array)):
        return value
    if value.shape != ():
        raise ValueError(
            f"`{name}` has shape {value.shape}, but a scalar was expected. For a "
            "sweep, build and use the optimizer under `eqx.filter_vmap`."
        )
    _check_real(name, value)
    return value


def _check_real(name: str, value: Array | np.ndarray) -> None:
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(
            f"`{name}` has dtype {value.dtype}, but a real number was expected: pass a "
            "floating-point array."
        )


def real_array(name: str, value: object, domain: Domain) -> float | Array | np.ndarray:
    """Real numbers, checked: a Python float, or an array of any shape in the default
    float (JAX) or in float64 (NumPy)."""
    if not isinstance(value, (np.ndarray, jax.Array)):
        return float(hyperparam(name, value, domain))
    if domain.is_decay:
        _check_precision(name, value)
    _check_real(name, value)
    x = wide(value) if isinstance(value, jax.Array) else value.astype(np.float64)
    numbers = [] if isinstance(x, Tracer) else np.asarray(x, np.float64).ravel()
    for number in numbers:
        if not domain.contains(number):
            hyperparam(name, float(number), domain)  # raises
    return x


def _check_precision(name: str, value: object) -> None:
    dtype = getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if is_float and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"`{name}` is {describe(value)}, but a decay needs at least float32: "
            f"0.9999 rounds to 1 in {dtype}. Pass a Python float or a float32 array "
            "(in `optax.inject_hyperparams`, set `hyperparam_dtype=jnp.float32`)."
        )


class Purpose(enum.Enum):
    """What a schedule in this package is for."""

    alpha = enum.auto()
    decay = enum.auto()
    learning_rate = enum.auto()
    weight_decay = enum.auto()


def check_schedule(name: str, value: object, *allowed: Purpose) -> None:
    """Detects swapped schedules. The purpose of a user's own function is unknown."""
    purpose = getattr(value, "purpose", None)
    if isinstance(purpose, Purpose) and purpose not in allowed:
        raise TypeError(
            f"`{name}` is {describe(value)}, which is a schedule for another "
            "hyperparameter. Were two schedules swapped?"
        )


def check_schedules(optim: object, names: tuple[str, ...]) -> None:
    """Detects swapped schedules among the hyperparameters of an optimizer."""
    for name in names:
        check_schedule(
            name, getattr(optim, name), *_ALLOWED.get(name, (Purpose.decay,))
        )


# A learning rate or weight decay can follow the shape of another hyperparameter's
# schedule. A decay rate such as `b3` cannot.
_ALLOWED = {
    "alpha": (Purpose.alpha,),
    "learning_rate": (Purpose.learning_rate, Purpose.alpha),
    "weight_decay": (Purpose.weight_decay, Purpose.learning_rate, Purpose.alpha),
}


def check_eps(eps: HyperParam, eps_root: HyperParam) -> None:
    if is_zero(eps) and is_zero(eps_root):
        raise ValueError(
            "`eps` and `eps_root` are both 0, but one must be positive: a zero "
            "gradient would give 0/0. The default is `eps=1e-8`."
        )


def checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` is {describe(value)}, but a bool was expected. Pass True or "
            "False."
        )
    return bool(value)


def positive_int(name: str, value: Any) -> int:
    """A number of steps, checked. It becomes a 32-bit counter."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_int and 1 <= value <= np.iinfo(np.int32).max:
        return int(value)
    raise ValueError(
        f"`{name}` is {describe(value)}, but an int from 1 to 2**31 - 1 was expected: "
        "the number of steps of the run."
    )


def check_one_divisor(bias_correct_m1: bool, normalize: bool) -> None:
    if bias_correct_m1 and normalize:
        raise ValueError(
            "`bias_correct_m1` and `normalize` are both true, but each divides the "
            "momentum by its own number. Choose one of them."
        )


#
# Resolved
#


class AbstractHyperparams(eqx.Module):
    """The hyperparameters of an optimizer at a step. Users set the public fields. The
    private fields are derived from them, and the rule uses those."""

    learning_rate: eqx.AbstractVar[Scalar]
    weight_decay: eqx.AbstractVar[Scalar]
    _eps: eqx.AbstractVar[Scalar]
    _clip_update_rms: eqx.AbstractVar[Scalar | None]

    def __repr__(self) -> str:
        """Shows numbers, where Equinox would show `f32[]`."""
        names = [x.name for x in dataclasses.fields(self) if x.repr]
        parts = (f"{name}={shown(getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({', '.join(parts)})"


def shown(value: object) -> str:
    """A value in readable form: arrays as their numbers."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if not _is_readable(value):
        return eqx.tree_pformat(value)
    # As a NumPy scalar, a float32 0.1 is `0.1`, not `0.10000000149011612`.
    return str(np.asarray(value)[()])


def _is_readable(value: object) -> bool:
    """Whether a value is an array whose numbers are on this machine."""
    if isinstance(value, Tracer) or not isinstance(value, jax.Array):
        return isinstance(value, (np.ndarray, np.generic))
    is_here = value.is_fully_addressable or value.is_fully_replicated
    return is_here and not value.is_deleted()


H = TypeVar("H", bound=AbstractHyperparams)


def in_dtype(h: H, real: DType) -> H:
    """Resolved hyperparameters in the dtype in which a leaf is computed."""
    h = jax.tree.map(lambda x: x if x.dtype == real else saturated(x.astype(real)), h)
    # An `eps` that is 0 in this dtype must not turn a zero gradient into 0/0.
    eps = lambda h: h._eps
    return eqx.tree_at(eps, h, jnp.maximum(eps(h), jnp.finfo(real).tiny))


def public_part(h: H) -> H:
    """Resolved hyperparameters without the derived values."""
    public = object.__new__(type(h))
    for name, value in vars(h).items():
        if not name.startswith("_"):
            # A module is frozen after `__init__`, which would need all fields.
            object.__setattr__(public, name, value)
    return public


class Hyperparams(AbstractHyperparams):
    """What [`eqx_ademamix.hyperparams`][] returns for an [`eqx_ademamix.AdEMAMix`][].

    **Attributes:** `learning_rate`, `b1`, `b2`, `b3`, `alpha`, `weight_decay`: arrays
    of shape `()` in the default float.
    """

    learning_rate: Scalar
    b1: Scalar
    b2: Scalar
    b3: Scalar
    alpha: Scalar
    weight_decay: Scalar
    _decay1: Decay = eqx.field(repr=False)
    _decay2: Decay = eqx.field(repr=False)
    _decay3: Decay = eqx.field(repr=False)
    _bias1: Scalar = eqx.field(repr=False)  # 1 - b1^t
    _bias2: Scalar = eqx.field(repr=False)  # 1 - b2^t
    _m2_weight: Scalar | None = eqx.field(repr=False)  # after this step
    _eps: Scalar = eqx.field(repr=False)
    _eps_root: Scalar = eqx.field(repr=False)
    _max_slow_ratio: Scalar | None = eqx.field(repr=False)
    _clip_update_rms: Scalar | None = eqx.field(repr=False)


class SimplifiedHyperparams(AbstractHyperparams):
    """What [`eqx_ademamix.hyperparams`][] returns for an
    [`eqx_ademamix.SimplifiedAdEMAMix`][].

    **Attributes:** `learning_rate`, `b1`, `b2`, `alpha`, `weight_decay`: arrays of
    shape `()` in the default float.
    """

    learning_rate: Scalar
    b1: Scalar
    b2: Scalar
    alpha: Scalar
    weight_decay: Scalar
    _decay1: Decay = eqx.field(repr=False)
    _decay2: Decay = eqx.field(repr=False)
    _bias2: Scalar = eqx.field(repr=False)  # 1 - b2^t
    _num: Scalar = eqx.field(repr=False)  # after this step
    _divisor: Scalar = eqx.field(repr=False)  # of alpha g + m
    _eps: Scalar = eqx.field(repr=False)
    _eps_root: Scalar = eqx.field(repr=False)
    _clip_update_rms: Scalar | None = eqx.field(repr=False)
