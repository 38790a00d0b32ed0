"""Simplified AdEMAMix: its hyperparameters and its rule."""
# The rule reads the derived values of its own hyperparameters.
# pyright: reportPrivateUsage=false

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ._filters import FilterSpec, with_python_bools
from ._hyperparams import (
    HyperParam,
    HyperParamLike,
    HyperParamLikeOrSchedule,
    HyperParamOrSchedule,
    SimplifiedHyperparams,
    check_eps,
    check_one_divisor,
    check_schedules,
    checked_flag,
    decay,
    finite,
    hyperparam,
    hyperparam_or_schedule,
    limit,
    non_negative,
    resolve,
    resolve_decay,
    resolve_limit,
)
from ._learning_rate_scale import Scales, checked_scales
from ._numerics import (
    Decay,
    abs_squared,
    bias,
    moving_average,
    moving_sum,
    over,
    times,
)
from ._state import SimplifiedAdEMAMixState
from ._step import AbstractMomentOptimizer
from ._storage.format import Moments, StateFormat, checked_format
from ._typing import no_type_check


class SimplifiedAdEMAMix(
    AbstractMomentOptimizer[SimplifiedAdEMAMixState, SimplifiedHyperparams]
):
    r"""AdEMAMix with one momentum instead of two, plus the current gradient with its
    own weight (Morwani, Vyas, Zhang, Kakade 2025, arXiv:2502.02431).

    With the gradient $g$, the parameter $\theta$, and the step $t = 1, 2, \dots$:

    $$
    \begin{align*}
    m &\leftarrow \beta_1(t) \, m + g
        & n &\leftarrow \beta_1(t) \, n + 1 \\
    \nu &\leftarrow \beta_2 \nu + (1 - \beta_2) |g|^2
        & \hat \nu &= \nu / (1 - \beta_2^t) \\
    \theta &\leftarrow \theta - \eta(t) \left(
        \frac{(\alpha(t) \, g + m) / d}
        {\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon}
        + \lambda \theta \right)
    \end{align*}
    $$

    The scalar $n$ is `num`, the sum of the weights of all gradients in $m$. The divisor
    $d$ is 1 by default, $n$ with `bias_correct_m1`, and $n + \alpha$ with `normalize`.

    $m$ is a sum, not an average: at $\beta_1 = 0.99$, it grows to the size of 100
    gradients, so the learning rate must be about 100 times smaller than AdamW's. With
    `normalize`, a constant gradient gives a step of one learning rate from the first
    step on, for every $\alpha$ and $\beta_1$.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.SimplifiedAdEMAMix(
            learning_rate=1e-3,
            b1=eqx_ademamix.beta3_scheduler(0.99, 0.9, warmup=1000, offset=1),
            alpha=10.0,
            normalize=True,
        )
        state = eqx_ademamix.init(optim, {"w": jnp.ones(3)})
        ```
    """

    learning_rate: HyperParamOrSchedule
    b1: HyperParamOrSchedule
    b2: HyperParamOrSchedule
    alpha: HyperParamOrSchedule
    eps: HyperParam
    eps_root: HyperParam
    weight_decay: HyperParamOrSchedule
    weight_decay_mask: FilterSpec
    trainable: FilterSpec
    state_format: StateFormat
    bias_correct_m1: bool = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)
    decoupled_weight_decay: bool = eqx.field(static=True)
    learning_rate_scale: Scales
    clip_update_rms: HyperParam | None
    skip_nonfinite: bool = eqx.field(static=True)

    @staticmethod
    def averages(
        g: Array, m: Moments[Array], h: SimplifiedHyperparams
    ) -> Moments[Array]:
        """The rule on one leaf: the moments. The sum `m` takes the place of `m2`."""
        return Moments(
            m1=None,
            m2=moving_sum(m.m2, g, h._decay1),
            nu=moving_average(m.nu, abs_squared(g), h._decay2),
        )

    @staticmethod
    def direction(g: Array, m: Moments[Array], h: SimplifiedHyperparams) -> Array:
        """The rule on one leaf: the direction, before the learning rate and decay."""
        momentum = times(1 / h._divisor, times(h.alpha, g) + m.m2)
        nu_hat = times(1 / h._bias2, m.nu)
        return over(momentum, jnp.sqrt(nu_hat + h._eps_root) + h._eps)

    def resolve(self, state: SimplifiedAdEMAMixState) -> SimplifiedHyperparams:
        """The hyperparameters of the next step, at the counter before it."""
        count = state.count
        b1, complement1 = resolve_decay("b1", self.b1, count)
        b2, complement2 = resolve_decay("b2", self.b2, count)
        decay1, num = Decay.of(complement1), state.num.astype(float)
        num = moving_sum(num, jnp.ones_like(num), decay1)
        alpha = resolve("alpha", self.alpha, count, non_negative)
        divisor = num if self.bias_correct_m1 else jnp.ones_like(num)
        divisor = num + alpha if self.normalize else divisor
        return SimplifiedHyperparams(
            learning_rate=resolve("learning_rate", self.learning_rate, count, finite),
            b1=b1,
            b2=b2,
            alpha=alpha,
            weight_decay=resolve(
                "weight_decay", self.weight_decay, count, non_negative
            ),
            _decay1=decay1,
            _decay2=Decay.of(complement2),
            _bias2=bias(complement2, count.astype(float) + 1.0, state.nu_weight),
            _num=num,
            _divisor=divisor,
            _eps=resolve("eps", self.eps, count, non_negative),
            _eps_root=resolve("eps_root", self.eps_root, count, non_negative),
            _clip_update_rms=resolve_limit(
                "clip_update_rms", self.clip_update_rms, count
            ),
        )

    @property
    def state_type(self) -> type[SimplifiedAdEMAMixState]:
        return SimplifiedAdEMAMixState

    @property
    def has_m1(self) -> bool:
        return False

    @property
    def weights(self) -> tuple[str, ...]:
        return ("num", "nu_weight") if callable(self.b2) else ("num",)

    @no_type_check
    def __init__(
        self,
        learning_rate: optax.ScalarOrSchedule,
        b1: HyperParamLikeOrSchedule = 0.99,
        b2: HyperParamLikeOrSchedule = 0.95,
        alpha: HyperParamLikeOrSchedule = 0.0,
        eps: HyperParamLike = 1e-8,
        eps_root: HyperParamLike = 0.0,
        weight_decay: HyperParamLikeOrSchedule = 0.0,
        weight_decay_mask: FilterSpec = True,
        trainable: FilterSpec = True,
        state_format: StateFormat = StateFormat.float32(),
        *,
        bias_correct_m1: bool = False,
        normalize: bool = False,
        decoupled_weight_decay: bool = False,
        learning_rate_scale: Scales = 1.0,
        clip_update_rms: HyperParamLike | None = None,
        skip_nonfinite: bool = False,
    ):
        r"""**Arguments:** those of [`eqx_ademamix.AdEMAMix`][], except:

        - `b1`: $\beta_1$, the decay rate of $m$, in [0, 1); or a schedule.
        - `alpha`: $\alpha$, the extra weight of the current gradient, at least 0; or a
            schedule. Schedules are called with `state.count`.
        - `state_format`: its entry `m2` says how $m$ is stored.
        - `bias_correct_m1`: whether to divide by $n$.
        - `normalize`: whether to divide by $n + \alpha$. Cannot be combined with
            `bias_correct_m1`.

        There is no `max_slow_ratio`, since there is no fast average besides $m$.

        **Raises:**

        - `ValueError` or `TypeError`: for values out of range.
        """
        rate = hyperparam_or_schedule("learning_rate", learning_rate, finite)
        self.learning_rate = rate
        self.b1 = hyperparam_or_schedule("b1", b1, decay)
        self.b2 = hyperparam_or_schedule("b2", b2, decay)
        self.alpha = hyperparam_or_schedule("alpha", alpha, non_negative)
        self.eps = hyperparam("eps", eps, non_negative)
        self.eps_root = hyperparam("eps_root", eps_root, non_negative)
        self.weight_decay = hyperparam_or_schedule(
            "weight_decay", weight_decay, non_negative
        )
        self.weight_decay_mask = with_python_bools(weight_decay_mask)
        self.trainable = with_python_bools(trainable)
        self.state_format = checked_format(state_format)
        self.bias_correct_m1 = checked_flag("bias_correct_m1", bias_correct_m1)
        self.normalize = checked_flag("normalize", normalize)
        self.decoupled_weight_decay = checked_flag(
            "decoupled_weight_decay", decoupled_weight_decay
        )
        self.learning_rate_scale = checked_scales(learning_rate_scale)
        self.clip_update_rms = limit("clip_update_rms", clip_update_rms)
        self.skip_nonfinite = checked_flag("skip_nonfinite", skip_nonfinite)
        check_schedules(self, ("learning_rate", "b1", "b2", "alpha", "weight_decay"))
        check_eps(self.eps, self.eps_root)
        check_one_divisor(self.bias_correct_m1, self.normalize)
