"""AdEMAMix for Equinox models: typed hyperparameters, typed state, right numbers."""

from ._ademamix import AdEMAMix as AdEMAMix
from ._ademamix import AdEMAMixState as AdEMAMixState
from ._ademamix import Hyperparams as Hyperparams
from ._ademamix import hyperparams as hyperparams
from ._codecs import AbstractCodec as AbstractCodec
from ._codecs import ScaledFloat8 as ScaledFloat8
from ._codecs import ScaledFloat16 as ScaledFloat16
from ._codecs import SplitBfloat16 as SplitBfloat16
from ._compensated import Compensated as Compensated
from ._compensated import CompensatedState as CompensatedState
from ._encoded import Encoded as Encoded
from ._extend import extend as extend
from ._formats import StateFormat as StateFormat
from ._inspection import decoded as decoded
from ._inspection import state_bytes as state_bytes
from ._inspection import state_report as state_report
from ._masks import decay_mask as decay_mask
from ._masks import decay_report as decay_report
from ._moments import tree_bias_correction as tree_bias_correction
from ._moments import tree_cast as tree_cast
from ._moments import tree_update_moment as tree_update_moment
from ._moments import (
    tree_update_moment_per_elem_norm as tree_update_moment_per_elem_norm,
)
from ._moments import tree_zeros_like as tree_zeros_like
from ._optax import ScaleByAdemamixState as ScaleByAdemamixState
from ._optax import ademamix as ademamix
from ._optax import from_adamw as from_adamw
from ._optax import from_optax as from_optax
from ._optax import scale_by_ademamix as scale_by_ademamix
from ._optax import to_adamw as to_adamw
from ._optax import to_optax as to_optax
from ._optimizer import AbstractOptimizer as AbstractOptimizer
from ._optimizer import init as init
from ._optimizer import update as update
from ._schedules import AlphaSchedule as AlphaSchedule
from ._schedules import Beta3Schedule as Beta3Schedule
from ._schedules import alpha_scheduler as alpha_scheduler
from ._schedules import beta3_scheduler as beta3_scheduler
from ._torch import from_torch as from_torch
from ._version import __version__ as __version__
