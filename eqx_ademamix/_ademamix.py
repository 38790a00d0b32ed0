"""AdEMAMix: its hyperparameters and its rule."""
# The rule reads the derived values of its own hyperparameters.
# pyright: reportPrivateUsage=false

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ._filters import FilterSpec, with_python_bools
from ._guards import limited_ratio
from ._hyperparams import (
    HyperParam,
    HyperParamLike,
    HyperParamLikeOrSchedule,
    HyperParamOrSchedule,
    Hyperparams,
    Scalar,
    check_eps,
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
    next_weight,
    over,
    times,
)
from ._state import AdEMAMixState
from ._step import AbstractMomentOptimizer
from ._storage.format import Moments, StateFormat, checked_format
from ._typing import no_type_check


class AdEMAMix(AbstractMomentOptimizer[AdEMAMixState, Hyperparams]):
    r"""AdamW with a second, slow average of the gradients
    (Pagliardini, Ablin, Grangier 2024, arXiv:2409.03137, Algorithm 1).

    With the gradient $g$, the parameter $\theta$, and the step $t = 1, 2, \dots$:

    $$
    \begin{align*}
    m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g
        & \hat m_1 &= m_1 / (1 - \beta_1^t) \\
    m_2 &\leftarrow \beta_3(t) \, m_2 + (1 - \beta_3(t)) g \\
    \nu &\leftarrow \beta_2 \nu + (1 - \beta_2) |g|^2
        & \hat \nu &= \nu / (1 - \beta_2^t) \\
    \theta &\leftarrow \theta - \eta(t) \left(
        \frac{\hat m_1 + \alpha(t) \, m_2}
        {\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon}
        + \lambda \theta \right)
    \end{align*}
    $$

    $m_2$ is not bias-corrected: it fills slowly, while $\alpha$ and $\beta_3$ warm up.
    $\alpha = 0$ is AdamW.

    Every hyperparameter is a field. A Python number is static under `eqx.filter_jit`:
    changing it triggers recompilation. An array of shape `()` is traced: changing its
    value does not. A batch of values under `eqx.filter_vmap` turns a sweep into one
    program.

    You can use the optimizer anywhere optax needs only its `init` and `update`. With
    `optax.inject_hyperparams`, mark as static every argument that is neither a number
    nor a schedule for optax to resolve: `optax.inject_hyperparams(AdEMAMix,
    static_args=("b3", "alpha", "weight_decay_mask", "trainable", "state_format"))`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        num_steps = 10_000
        optim = eqx_ademamix.AdEMAMix(
            learning_rate=1e-3,
            b3=eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=num_steps),
            alpha=eqx_ademamix.alpha_scheduler(8.0, 0.0, warmup=num_steps),
            weight_decay=0.1,
            weight_decay_mask=eqx_ademamix.decay_mask(model),
        )
        state = eqx_ademamix.init(optim, model)
        ```
    """

    learning_rate: HyperParamOrSchedule
    b1: HyperParamOrSchedule
    b2: HyperParamOrSchedule
    b3: HyperParamOrSchedule
    alpha: HyperParamOrSchedule
    eps: HyperParam
    eps_root: HyperParam
    weight_decay: HyperParamOrSchedule
    weight_decay_mask: FilterSpec
    trainable: FilterSpec
    state_format: StateFormat
    bias_correct_m2: bool = eqx.field(static=True)
    decoupled_weight_decay: bool = eqx.field(static=True)
    learning_rate_scale: Scales
    max_slow_ratio: HyperParam | None
    clip_update_rms: HyperParam | None
    skip_nonfinite: bool = eqx.field(static=True)

    @staticmethod
    def averages(g: Array, m: Moments[Array], h: Hyperparams) -> Moments[Array]:
        """Algorithm 1 on one leaf: the moments."""
        return Moments(
            m1=None if m.m1 is None else moving_average(m.m1, g, h._decay1),
            m2=moving_average(m.m2, g, h._decay3),
            nu=moving_average(m.nu, abs_squared(g), h._decay2),
        )

    @staticmethod
    def direction(g: Array, m: Moments[Array], h: Hyperparams) -> Array:
        """Algorithm 1 on one leaf: the direction, before the learning rate and
        decay."""
        m1_hat = g if m.m1 is None else times(1 / h._bias1, m.m1)  # b1 = 0: m1 is g
        m2_hat = m.m2 if h._m2_weight is None else times(1 / h._m2_weight, m.m2)
        nu_hat = times(1 / h._bias2, m.nu)
        if h._max_slow_ratio is not None:
            m2_hat = limited_ratio(m2_hat, nu_hat, h._max_slow_ratio)
        denominator = jnp.sqrt(nu_hat + h._eps_root) + h._eps
        return over(m1_hat + times(h.alpha, m2_hat), denominator)

    def resolve(self, state: AdEMAMixState) -> Hyperparams:
        """The hyperparameters of the next step, at the counters before it."""
        count, count_m2 = state.count, state.count_m2
        b1, complement1 = resolve_decay("b1", self.b1, count)
        b2, complement2 = resolve_decay("b2", self.b2, count)
        b3, complement3 = resolve_decay("b3", self.b3, count_m2)
        decay3, t = Decay.of(complement3), count.astype(float) + 1.0
        return Hyperparams(
            learning_rate=resolve("learning_rate", self.learning_rate, count, finite),
            b1=b1,
            b2=b2,
            b3=b3,
            alpha=resolve("alpha", self.alpha, count_m2, non_negative),
            weight_decay=resolve(
                "weight_decay", self.weight_decay, count, non_negative
            ),
            _decay1=Decay.of(complement1),
            _decay2=Decay.of(complement2),
            _decay3=decay3,
            _bias1=bias(complement1, t, state.m1_weight),
            _bias2=bias(complement2, t, state.nu_weight),
            _m2_weight=self._weight_of_m2(state, decay3),
            _eps=resolve("eps", self.eps, count, non_negative),
            _eps_root=resolve("eps_root", self.eps_root, count, non_negative),
            _max_slow_ratio=resolve_limit("max_slow_ratio", self.max_slow_ratio, count),
            _clip_update_rms=resolve_limit(
                "clip_update_rms", self.clip_update_rms, count
            ),
        )

    def _weight_of_m2(self, state: AdEMAMixState, decay3: Decay) -> Scalar | None:
        """The weight of all gradients in `m2` after the next step."""
        if not self.bias_correct_m2 or state.m2_weight is None:
            return None
        return next_weight(state.m2_weight, decay3)

    @property
    def state_type(self) -> type[AdEMAMixState]:
        return AdEMAMixState

    @property
    def has_m1(self) -> bool:
        """False for a Python `b1=0`, where `m1` would equal the gradient."""
        return not (isinstance(self.b1, float) and self.b1 == 0.0)

    @property
    def weights(self) -> tuple[str, ...]:
        kept = {
            "m2_weight": self.bias_correct_m2,
            "m1_weight": callable(self.b1),
            "nu_weight": callable(self.b2),
        }
        return tuple(name for name, is_kept in kept.items() if is_kept)

    @no_type_check
    def __init__(
        self,
        learning_rate: optax.ScalarOrSchedule,
        b1: HyperParamLikeOrSchedule = 0.9,
        b2: HyperParamLikeOrSchedule = 0.999,
        b3: HyperParamLikeOrSchedule = 0.9999,
        alpha: HyperParamLikeOrSchedule = 5.0,
        eps: HyperParamLike = 1e-8,
        eps_root: HyperParamLike = 0.0,
        weight_decay: HyperParamLikeOrSchedule = 0.0,
        weight_decay_mask: FilterSpec = True,
        trainable: FilterSpec = True,
        state_format: StateFormat = StateFormat.float32(),
        *,
        bias_correct_m2: bool = False,
        decoupled_weight_decay: bool = False,
        learning_rate_scale: Scales = 1.0,
        max_slow_ratio: HyperParamLike | None = None,
        clip_update_rms: HyperParamLike | None = None,
        skip_nonfinite: bool = False,
    ):
        r"""**Arguments:**

        - `learning_rate`: $\eta$, finite; or a schedule, called with `state.count`.
        - `b1`: $\beta_1$, the decay rate of the fast average, in [0, 1). With a Python
            0, no `m1` is stored, which saves a third of the state. Or a schedule,
            called with `state.count`, usually
            [`eqx_ademamix.log_time_beta_scheduler`][]. The bias correction is then
            $1 - \prod_i \beta_1(i)$, which the state keeps as `m1_weight`.
        - `b2`: $\beta_2$, the decay rate of the average of the squares, in [0, 1); or a
            schedule, as for `b1`. The state then keeps `nu_weight`.
        - `b3`: $\beta_3$, the decay rate of the slow average, in [0, 1); or a schedule,
            called with `state.count_m2`, usually [`eqx_ademamix.beta3_scheduler`][]. A
            schedule may have a method `complement(step)` that gives $1 - \beta_3$
            without cancellation.
        - `alpha`: $\alpha$, the weight of the slow average, at least 0; or a schedule,
            called with `state.count_m2`, usually [`eqx_ademamix.alpha_scheduler`][].
        - `eps`: $\epsilon$, at least 0.
        - `eps_root`: $\epsilon_\text{root}$, at least 0. It is in the authors' code and
            in optax, but not in Algorithm 1. Use a positive number to take derivatives
            through the update. `eps` and `eps_root` must not both be 0.
        - `weight_decay`: $\lambda$, at least 0; or a schedule, called with
            `state.count`. As in PyTorch's AdamW, it is multiplied by the learning rate.
            Unless it is a Python 0, `update` needs `params`.
        - `weight_decay_mask`: a filter spec that chooses which of the trained arrays
            are decayed: a bool, a tree of bools (shaped like the model, like the
            filtered model, or like a prefix of these), or a callable from one array to
            a bool. Usually [`eqx_ademamix.decay_mask`][]`(model)`.
        - `trainable`: a filter spec that chooses which of the model's inexact arrays
            are trained. All others have no state, and their update is `None`.
        - `state_format`: a [`eqx_ademamix.StateFormat`][], which says how the moments
            are stored. By default, as float32, or in the parameter's dtype if that is
            wider.
        - `bias_correct_m2`: whether to divide $m_2$ by the sum of the weights of all
            gradients in it, $1 - \prod_i \beta_3(i)$, so that it is a true average from
            the first step on. The paper does this in its Figure 2, but Algorithm 1 does
            not. The state then keeps that sum, `m2_weight`.
        - `decoupled_weight_decay`: whether the decay term is $-\lambda(t) \, \theta$,
            without the learning rate (Loshchilov & Hutter 2019, arXiv:1711.05101,
            Algorithm 2). To decay the term with the learning rate, give `weight_decay`
            a schedule of the same shape.
        - `learning_rate_scale`: a factor that multiplies the learning rate, and so a
            coupled weight decay: one number for all parameters, or a tree shaped like
            the model or a prefix of it. Each leaf is a number or, for stacked layers,
            an array over the first axes of its parameters. Usually
            [`eqx_ademamix.path_scales`][]`(model, rules)`.
        - `max_slow_ratio`: $r > 0$, or `None` (off). In the update, the magnitude of
            each entry of $m_2$ (divided by its weight with `bias_correct_m2`) is
            clipped to $r \sqrt{\hat \nu}$. The $m_2$ in the state does not change. So
            the slow average never moves an entry by more than $\alpha r$ learning rates
            per step, even where the gradients have vanished and $\sqrt{\hat \nu}$
            decays faster than $m_2$. The recommended value is 1. The weights $w_i$ of
            the gradients in $m_2$ add up to at most 1, so
            $|m_2|^2 = |\sum_i w_i g_i|^2 \le \sum_i w_i |g_i|^2$ (Jensen). For
            stationary gradients, the mean of the right-hand side is at most that of
            $\hat \nu$. So $|m_2|$ far exceeds $\sqrt{\hat \nu}$ only where the
            gradients have shrunk. [Guards](../guards.md#in-normal-training) says how
            often that happens in training.
        - `clip_update_rms`: $c > 0$, or `None` (off). The direction $d$ of each leaf,
            which is the fraction in the last line of the algorithm, is multiplied by
            $\min(1, c / \text{RMS}(d))$, before the learning rate and the decay. So no
            leaf's RMS step exceeds $c$ learning rates. The RMS is over the whole leaf:
            layers stacked in one array share one RMS, as do all shards of an array,
            except inside `jax.shard_map`, where each shard has its own. In a vmapped
            update, each member has its own. StableAdamW (Wortsman et al. 2023,
            arXiv:2304.13013, Algorithm 2) divides the learning rate of each leaf by
            $\max(1, \text{RMS}(g / \sqrt{\hat \nu}))$, as Adafactor's clipping does.
            That reacts to a sudden large gradient, but not to a slow average that is
            too large. $d$ contains both.
        - `skip_nonfinite`: whether to skip a step with a NaN or infinity in the
            gradients of the trained leaves: the updates are 0 (no weight decay either),
            and the moments and counters do not change, bit for bit. The state counts
            such steps in `skipped`. All devices make the same decision; each member of
            a vmapped update decides on its own. `optax.apply_if_finite` does the same,
            but limits the number of errors and wraps the state in another one.

        Schedules are called with the number of steps taken so far (0, 1, 2, ...), as in
        optax. The paper's $t$ is one more.

        **Raises:**

        - `ValueError` or `TypeError`: for values out of range. Traced values are not
            checked.
        """
        self.learning_rate = hyperparam_or_schedule(
            "learning_rate", learning_rate, finite
        )
        self.b1 = hyperparam_or_schedule("b1", b1, decay)
        self.b2 = hyperparam_or_schedule("b2", b2, decay)
        self.b3 = hyperparam_or_schedule("b3", b3, decay)
        self.alpha = hyperparam_or_schedule("alpha", alpha, non_negative)
        self.eps = hyperparam("eps", eps, non_negative)
        self.eps_root = hyperparam("eps_root", eps_root, non_negative)
        self.weight_decay = hyperparam_or_schedule(
            "weight_decay", weight_decay, non_negative
        )
        self.weight_decay_mask = with_python_bools(weight_decay_mask)
        self.trainable = with_python_bools(trainable)
        self.state_format = checked_format(state_format)
        self.bias_correct_m2 = checked_flag("bias_correct_m2", bias_correct_m2)
        self.decoupled_weight_decay = checked_flag(
            "decoupled_weight_decay", decoupled_weight_decay
        )
        self.learning_rate_scale = checked_scales(learning_rate_scale)
        self.max_slow_ratio = limit("max_slow_ratio", max_slow_ratio)
        self.clip_update_rms = limit("clip_update_rms", clip_update_rms)
        self.skip_nonfinite = checked_flag("skip_nonfinite", skip_nonfinite)
        scheduled = ("learning_rate", "b1", "b2", "b3", "alpha", "weight_decay")
        check_schedules(self, scheduled)
        check_eps(self.eps, self.eps_root)
