"""What an expert would say about a configuration before the run: `review`."""

import functools as ft
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._ademamix import AdEMAMix
from ._hyperparams import (
    Domain,
    finite,
    hyperparam,
    non_negative,
    positive_int,
    resolve_decay,
)
from ._inspection import unwrapped
from ._optimizer import AbstractOptimizer, OptaxOptimizer
from ._paths import describe
from ._schedules import (
    GOOD_HALF_LIVES,
    AlphaCooldownSchedule,
    AlphaSchedule,
    Beta3Schedule,
)
from ._simplified import SimplifiedAdEMAMix
from ._stall import FROZEN, expected_m2_stall
from ._storage.codec import Dense
from ._typing import no_type_check


_Member: TypeAlias = AbstractOptimizer[Any] | OptaxOptimizer


#
# Thresholds
#

# Without a warm-up of alpha, a model with 1.3 billion parameters trained stably only at
# alpha = 1 (arXiv:2409.03137, Figure 14).
_LARGEST_FIRST_ALPHA = 1.0

# The recipes of the paper and of the benchmark (arXiv:2509.01440) let b3 start at b1 =
# 0.9, with a half-life of 7 steps. The smallest b3 that they end with is 0.999, with
# 693 steps. Midway between the two is 0.99, with 69 steps.
_LONGEST_FIRST_HALF_LIFE = 69.0

# b3 = 0.999 is better than 0.9999 at 32,000 steps in Figure 17 of the paper, and below
# 32,000 in section D.1 of the benchmark. At 64,000, the two disagree. 0.9999 has 4.6
# half-lives in 32,000 steps.
_FEWEST_HALF_LIVES = 4.6

# An average that remembers ten times as long as the fast one at b1 = 0.9 has b3 = 0.99.
# Ten of its half-lives are 690 steps.
_FEWEST_STEPS = 690

# "alpha from 4 to 10 works well in practice" (section 3), and all runs with such an
# alpha in Tables 2 to 4, in the benchmark, and of Apertus (arXiv:2509.14233) clip
# gradients to a norm of 0.1 to 0.5.
_LARGE_ALPHA = 4.0

# How many run lengths ahead to look for the end of a warm-up. A function that still
# changes there has none.
_FAR = 100
_LAST_STEP = 2**31 - 1  # where the counters of a state stop


@no_type_check
def review(optim: _Member | Sequence[_Member], *, num_steps: int) -> list[str]:
    r"""Finds problems in a configuration before the run. Each sentence
    gives the numbers behind it and what to change. There is one for each of these
    problems:

    - `alpha` is above 1 at step 0. Without a warm-up of `alpha`, a model with 1.3
        billion parameters was stable only at 1 (arXiv:2409.03137, Figure 14).
    - `b3` has a half-life above 69 steps (0.99) at step 0. The paper starts at 0.9.
    - A warm-up of `b3` or `alpha` is longer than the run.
    - Such a warm-up is shorter than both the run and one half-life of `b3` (Figure 13).
    - The run has fewer than 4.6 half-lives of `b3`. At 32,000 steps, which are 4.6
        half-lives of 0.9999, 0.999 is better (Figure 17), and also in shorter runs
        (arXiv:2509.01440, section D.1). The suggested value has fifteen half-lives in
        the run.
    - The run has fewer than 690 steps, which are ten half-lives of 0.99.
    - Nothing clips the gradients, and `alpha` reaches 4 or more. The published runs
        clip them.
    - The format of the state freezes more than half of `m2` at this `b3`, as in
        [`eqx_ademamix.stall_report`][].
    - Weight decay acts on every array: `weight_decay_mask` is `True`.

    At `alpha=0`, which is AdamW, only the last one applies. For a
    [`eqx_ademamix.SimplifiedAdEMAMix`][], only a long warm-up of `b1`, the format, and
    weight decay are checked. For an optax optimizer, only its name is known.

    **Arguments:**

    - `optim`: an optimizer of this package, alone or inside an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][]; or a list of the
        members of an optax chain, in its order. (An `optax.chain` itself is a closure
        and shows nothing.) Only a list shows whether gradients are clipped.
    - `num_steps`: the number of steps of the run: how many times `update` is called.

    **Returns:**

    A list of sentences, empty if all is well. Schedules are called at a few steps: at
    the beginning, middle, and end of the run. All except the warm-ups of
    [`eqx_ademamix.alpha_scheduler`][] and [`eqx_ademamix.beta3_scheduler`][] are also
    called after one half-life of `b3` and far beyond the end. So a report
    covers only these values.

    **Raises:**

    - `TypeError`: if `optim` contains no optimizer of this package, if a member of a
        list is not an optimizer, or if a hyperparameter is traced, since there is no
        number to read.
    - `ValueError`: if `num_steps` is not a positive int, if a schedule returns an
        illegal value, or if a hyperparameter is batched.

    !!! Example

        ```python
        import optax
        import eqx_ademamix

        num_steps = 100_000
        constant = eqx_ademamix.AdEMAMix(1e-3, b3=0.9999, alpha=5.0)
        for sentence in eqx_ademamix.review(constant, num_steps=num_steps):
            print(sentence)

        warming_up = eqx_ademamix.AdEMAMix(
            1e-3,
            b3=eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=num_steps),
            alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=num_steps),
        )
        members = [optax.clip_by_global_norm(0.5), warming_up]
        assert eqx_ademamix.review(members, num_steps=num_steps) == []
        ```
    """
    steps = positive_int("num_steps", num_steps)
    # Under `jit`, anything without traced inputs is computed at once. optax's own
    # schedules mix integers and floats.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        runs = [_run(*found, steps) for found in _found(optim)]
        return [text for run in runs for check in _checks(run) for text in check(run)]


#
# Optimizers, and lists of them
#


_Ours: TypeAlias = AdEMAMix | SimplifiedAdEMAMix


def _found(optim: object) -> list[tuple[_Ours, bool]]:
    """The optimizers of this package, each with a flag: whether nothing clips its
    gradients."""
    members, is_list = [unwrapped(optim)], False
    if isinstance(optim, list) or type(optim) is tuple:
        pairs = enumerate(cast(Sequence[object], optim))
        members, is_list = [_checked_member(*pair) for pair in pairs], True
    # Without a list, the step itself may clip.
    found = [
        (member, is_list and not any(map(_may_clip, members[:i])))
        for i, member in enumerate(members)
        if isinstance(member, _Ours)
    ]
    if not found:
        raise TypeError(
            f"`optim` is {describe(optim)}, but `review` sees no optimizer of this "
            "package in it. Pass one, or a list of the members of a chain, since an "
            "`optax.chain` does not show them: `review([optax.clip_by_global_norm(0.5),"
            " optim], num_steps=num_steps)`."
        )
    return found


def _checked_member(i: int, member: object) -> object:
    if not isinstance(member, OptaxOptimizer) or isinstance(member, type):
        raise TypeError(
            f"`optim[{i}]` is {describe(member)}, but an optimizer was expected. The "
            "list has the members of a chain, in its order."
        )
    return unwrapped(member)


# The optax transformations that neither clip nor contain others, by the prefix of their
# names.
_NEVER_CLIP = ("add_", "identity", "scale", "trace", "zero_nans")


def _may_clip(member: object) -> bool:
    """Whether a member may clip gradients, judging by the name of its function."""
    update = getattr(member, "update", None)
    is_of_optax = getattr(update, "__module__", "").startswith("optax")
    name = getattr(update, "__qualname__", "")
    return not (is_of_optax and name.startswith(_NEVER_CLIP))


#
# A hyperparameter over a run
#


class _Course(NamedTuple):
    """`alpha`, or a decay rate as its half-life in steps, over a run."""

    name: str
    first: float  # at step 0
    last: float  # at the last step
    final: float  # at the end of the warm-up
    # The step by which the warm-up has ended: 0 for a constant, and `inf` if the run
    # ends first. `None` if the end is unknown, or if the schedule has none.
    end: float | None

    @property
    def largest(self) -> float:
        return max(self.first, self.last, self.final)

    def text(self, value: float) -> str:
        return f"{value:.4g}" if self.name == "alpha" else _decay_text(value)

    def schedule(self, num_steps: int) -> str:
        """How to write a warm-up over the run."""
        if self.name == "alpha":
            return f"`alpha=alpha_scheduler({self.final:.4g}, warmup={num_steps})`"
        is_long = self.name == "b3" and num_steps < _FEWEST_HALF_LIVES * self.final
        shorter = max(num_steps / GOOD_HALF_LIVES, _half_life(0.1))
        end = _decay_text(shorter if is_long else self.final)
        return f"`{self.name}=beta3_scheduler({end}, 0.9, warmup={num_steps})`"


def _half_life(complement: float) -> float:
    return math.log(0.5) / math.log1p(-complement) if complement < 1 else 0.0


def _decay_text(half_life: float) -> str:
    """The decay rate of a half-life, with three digits of its difference from 1."""
    complement = -math.expm1(math.log(0.5) / half_life) if half_life > 0 else 1.0
    return f"{1 - float(f'{complement:.3g}'):.12g}"


def _course(
    name: str, value: Any, num_steps: int, half_life: float | None = None
) -> _Course:
    """Without a half-life, that of the hyperparameter itself counts."""
    if isinstance(value, AlphaCooldownSchedule):
        value = value.alpha  # before it cools down
    at = ft.partial(_value_at if name == "alpha" else _half_life_at, name)
    first, last = at(value, 0), at(value, num_steps - 1)
    if not callable(value):
        return _Course(name, first, first, first, 0.0)
    if isinstance(value, AlphaSchedule | Beta3Schedule):
        is_alpha = isinstance(value, AlphaSchedule)
        final = at(value.alpha if is_alpha else value.beta_end, 0)
        end = _number("warmup", value.warmup) - _number("offset", value.offset)
        return _Course(name, first, last, final, max(end, 0.0))
    return _sampled(name, ft.partial(at, value), num_steps, half_life)


def _sampled(
    name: str, at: Callable[[int], float], num_steps: int, half_life: float | None
) -> _Course:
    """The course of any other schedule, from a few of its values."""
    first, middle, last = map(at, (0, num_steps // 2, num_steps - 1))
    step = min(_FAR * num_steps, _LAST_STEP // 2)
    far, farther = at(step), at(2 * step)
    if not _close(far, farther) or far < max(middle, last):
        # It never ends, or it cools down.
        return _Course(name, first, last, max(first, middle, last), None)
    mark = min(int(far if half_life is None else half_life), num_steps)
    end = None
    if _close(first, far):
        end = 0.0
    elif not _close(at(num_steps), far):
        end = math.inf
    elif _close(at(mark), far):
        end = float(mark)
    return _Course(name, first, last, far, end)


def _close(x: float, y: float) -> bool:
    return math.isclose(x, y, rel_tol=1e-6)  # about ten float32 epsilons


def _value_at(name: str, value: object, step: int) -> float:
    """`alpha` or `weight_decay` at a step."""
    out = value(jnp.asarray(step, jnp.int32)) if callable(value) else value
    return _number(f"{name}({step})" if callable(value) else name, out, non_negative)


def _half_life_at(name: str, value: object, step: int) -> float:
    _, complement = resolve_decay(name, value, jnp.asarray(step, jnp.int32))
    _check_concrete(name, complement)
    return _half_life(float(complement))


def _number(name: str, value: object, domain: Domain = finite) -> float:
    _check_concrete(name, value)
    return float(hyperparam(name, value, domain))


def _check_concrete(name: str, value: object) -> None:
    if isinstance(value, Tracer):
        raise TypeError(
            f"`{name}` is traced, but `review` reads numbers. Call it outside of `jit` "
            "and `vmap`, before the run."
        )


#
# The checks. Each yields sentences.
#


class _Run(NamedTuple):
    optim: _Ours
    steps: int
    slow: _Course  # of b3, or of b1 of a `SimplifiedAdEMAMix`
    alpha: _Course | None
    is_unclipped: bool


def _run(optim: _Ours, is_unclipped: bool, steps: int) -> _Run:
    if isinstance(optim, SimplifiedAdEMAMix):
        return _Run(optim, steps, _course("b1", optim.b1, steps), None, is_unclipped)
    slow = _course("b3", optim.b3, steps)
    alpha = _course("alpha", optim.alpha, steps, slow.final)
    return _Run(optim, steps, slow, alpha, is_unclipped)


def _large_b3(run: _Run) -> Iterator[str]:
    b3 = run.slow
    if b3.first > _LONGEST_FIRST_HALF_LIFE:
        yield (
            f"`b3` is already {b3.text(b3.first)} at step 0, a half-life of "
            f"{b3.first:,.0f} steps. Such a slow average makes the beginning of a "
            "run unstable: the paper starts at 0.9 (arXiv:2409.03137, section 3). Pass "
            f"{b3.schedule(run.steps)}."
        )


def _large_alpha(run: _Run) -> Iterator[str]:
    alpha = run.alpha
    if alpha is not None and alpha.first > _LARGEST_FIRST_ALPHA:
        yield (
            f"`alpha` is already {alpha.text(alpha.first)} at step 0. Without a "
            "warm-up of `alpha`, a model with 1.3 billion parameters was stable only "
            "at 1 (arXiv:2409.03137, Figure 14). Pass "
            f"{alpha.schedule(run.steps)}."
        )


def _unfinished_warmups(run: _Run) -> Iterator[str]:
    for course in (run.slow, run.alpha):
        if course is None or course.end is None or course.end <= run.steps:
            continue
        is_unknown = math.isinf(course.end)
        takes = f"more than {run.steps:,}" if is_unknown else f"{course.end:,.0f}"
        yield (
            f"The warm-up of `{course.name}` to {course.text(course.final)} takes "
            f"{takes} steps, but the run has only {run.steps:,}. At its last step, "
            f"`{course.name}` is {course.text(course.last)}. Pass "
            f"{course.schedule(run.steps)}."
        )


def _hasty_warmups(run: _Run) -> Iterator[str]:
    b3, alpha = run.slow, run.alpha
    is_large = (
        b3.final > _LONGEST_FIRST_HALF_LIFE,
        (alpha is not None and alpha.final > _LARGEST_FIRST_ALPHA),
    )
    for course, counts in zip((b3, alpha), is_large, strict=True):
        if course is None or not counts or not course.end:
            continue
        if course.end < run.steps and course.end <= b3.final:
            yield (
                f"The warm-up of `{course.name}` to {course.text(course.final)} is "
                f"over by step {course.end:,.0f}, within one half-life of "
                f"`b3={b3.text(b3.final)}` ({b3.final:,.0f} steps). After a short "
                "warm-up, a run can diverge or end worse (arXiv:2409.03137, Figure "
                f"13). Let it last as long as the run: {course.schedule(run.steps)}."
            )


def _long_memory(run: _Run) -> Iterator[str]:
    b3, half_lives = run.slow, run.steps / max(run.slow.final, 1e-9)
    if half_lives < _FEWEST_HALF_LIVES:
        memory = 1 / -math.expm1(math.log(0.5) / b3.final)
        yield (
            f"`b3` reaches {b3.text(b3.final)}, which remembers about {memory:,.0f} "
            f"steps. The run of {run.steps:,} steps has only {half_lives:.1f} of its "
            "half-lives. A shorter memory was better at 4.6 "
            "(arXiv:2409.03137, Figure 17) and at fewer "
            "(arXiv:2509.01440, section D.1). Pass "
            f"{b3.schedule(run.steps)}."
        )


def _few_steps(run: _Run) -> Iterator[str]:
    if run.steps < _FEWEST_STEPS:
        yield (
            f"A run of {run.steps:,} steps is too short for a slow average: even "
            "with a decay of only 0.99, it needs ten half-lives, which are "
            f"{_FEWEST_STEPS:,} steps. Use AdamW, which is `alpha=0`."
        )


def _no_clipping(run: _Run) -> Iterator[str]:
    alpha = run.alpha
    if alpha is not None and run.is_unclipped and alpha.largest >= _LARGE_ALPHA:
        yield (
            f"`alpha` reaches {alpha.text(alpha.largest)}, and nothing in the list "
            "clips the gradients before the optimizer. After a spike, half of it is "
            f"still in the slow average {run.slow.final:,.0f} steps later. The "
            "published runs with such an `alpha` clip to a norm of 0.1 to 0.5. Put "
            "`optax.clip_by_global_norm(0.5)` first."
        )


def _frozen(run: _Run) -> Iterator[str]:
    slow, codec = run.slow, run.optim.state_format.m2
    b3 = 0.5 ** (1 / slow.final) if slow.final > 0 else 0.0
    # Enough digits for a relative change of 1 - b3.
    if isinstance(codec, Dense) and jnp.finfo(codec.dtype).eps < 1 - b3:
        return
    stalled = expected_m2_stall(codec, b3)
    if stalled > FROZEN:
        name = "m2" if isinstance(run.optim, AdEMAMix) else "m"
        kind = codec.dtype.name if isinstance(codec, Dense) else type(codec).__name__
        yield (
            f"`{name}` is stored as {kind}. At `{slow.name}={slow.text(slow.final)}`, "
            f"a typical step leaves {stalled:.0%} of its entries unchanged, because "
            "rounding loses the change. Store it by `ScaledFloat16()`, as in "
            "`StateFormat.half()`, or as float32."
        )


def _decays_everything(run: _Run) -> Iterator[str]:
    steps = (0, run.steps // 2, run.steps - 1)
    value = run.optim.weight_decay
    decay = max(_value_at("weight_decay", value, step) for step in steps)
    if decay > 0 and run.optim.weight_decay_mask is True:
        yield (
            f"`weight_decay` is {decay:.6g} and acts on every array, including "
            "biases and normalization layers. Pass "
            "`weight_decay_mask=decay_mask(model)`."
        )


_Check: TypeAlias = Callable[[_Run], Iterator[str]]


def _checks(run: _Run) -> tuple[_Check, ...]:
    if run.alpha is None:
        return _unfinished_warmups, _frozen, _decays_everything
    if run.alpha.largest == 0:  # AdamW
        return (_decays_everything,)
    return (
        _large_b3,
        _large_alpha,
        _unfinished_warmups,
        _hasty_warmups,
        _long_memory,
        _few_steps,
        _no_clipping,
        _frozen,
        _decays_everything,
    )
