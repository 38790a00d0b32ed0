"""AdEMAMix for Equinox: typed hyperparameters, typed state, accurate numerics."""

from . import presets as presets
from ._ademamix import AdEMAMix as AdEMAMix
from ._carry import TrainCarry as TrainCarry
from ._checkpoint.file import CheckpointError as CheckpointError
from ._checkpoint.saving import load as load
from ._checkpoint.saving import save as save
from ._decay_mask import decay_mask as decay_mask
from ._decay_mask import decay_report as decay_report
from ._diagnose import diagnose as diagnose
from ._hyperparams import Hyperparams as Hyperparams
from ._hyperparams import SimplifiedHyperparams as SimplifiedHyperparams
from ._inspection import decoded as decoded
from ._inspection import hyperparams as hyperparams
from ._inspection import state_bytes as state_bytes
from ._inspection import state_report as state_report
from ._interop.adamw import from_adamw as from_adamw
from ._interop.adamw import to_adamw as to_adamw
from ._interop.extend import extend as extend
from ._interop.optax import from_optax as from_optax
from ._interop.optax import to_optax as to_optax
from ._interop.scale import ScalingWarning as ScalingWarning
from ._interop.scale import scale_report as scale_report
from ._interop.scale import scale_to as scale_to
from ._interop.state_format import change_state_format as change_state_format
from ._interop.torch import from_torch as from_torch
from ._interop.transformations import ScaleByAdemamixState as ScaleByAdemamixState
from ._interop.transformations import ademamix as ademamix
from ._interop.transformations import scale_by_ademamix as scale_by_ademamix
from ._interop.transformations import (
    scale_by_simplified_ademamix as scale_by_simplified_ademamix,
)
from ._interop.transformations import simplified_ademamix as simplified_ademamix
from ._learning_rate_scale import learning_rate_report as learning_rate_report
from ._learning_rate_scale import path_scales as path_scales
from ._make_step import TrainStep as TrainStep
from ._make_step import make_step as make_step
from ._moments import tree_bias_correction as tree_bias_correction
from ._moments import tree_cast as tree_cast
from ._moments import tree_update_moment as tree_update_moment
from ._moments import (
    tree_update_moment_per_elem_norm as tree_update_moment_per_elem_norm,
)
from ._moments import tree_zeros_like as tree_zeros_like
from ._optimizer import AbstractOptimizer as AbstractOptimizer
from ._optimizer import init as init
from ._optimizer import update as update
from ._review import review as review
from ._schedule_report import plot_schedules as plot_schedules
from ._schedule_report import schedule_report as schedule_report
from ._schedules import AlphaCooldownSchedule as AlphaCooldownSchedule
from ._schedules import AlphaSchedule as AlphaSchedule
from ._schedules import Beta3Schedule as Beta3Schedule
from ._schedules import LearningRateSchedule as LearningRateSchedule
from ._schedules import LogTimeBetaSchedule as LogTimeBetaSchedule
from ._schedules import LogTimeWeightDecaySchedule as LogTimeWeightDecaySchedule
from ._schedules import PowerAlphaSchedule as PowerAlphaSchedule
from ._schedules import alpha_cooldown_scheduler as alpha_cooldown_scheduler
from ._schedules import alpha_scheduler as alpha_scheduler
from ._schedules import beta3_scheduler as beta3_scheduler
from ._schedules import from_half_life as from_half_life
from ._schedules import half_life as half_life
from ._schedules import log_time_beta_scheduler as log_time_beta_scheduler
from ._schedules import (
    log_time_weight_decay_scheduler as log_time_weight_decay_scheduler,
)
from ._schedules import power_alpha_scheduler as power_alpha_scheduler
from ._simplified import SimplifiedAdEMAMix as SimplifiedAdEMAMix
from ._stall import stall_report as stall_report
from ._state import AdEMAMixState as AdEMAMixState
from ._state import CompensatedState as CompensatedState
from ._state import SimplifiedAdEMAMixState as SimplifiedAdEMAMixState
from ._state_sharding import sharding_report as sharding_report
from ._state_sharding import state_sharding as state_sharding
from ._storage.codec import AbstractCodec as AbstractCodec
from ._storage.codec import Dense as Dense
from ._storage.codec import Encoded as Encoded
from ._storage.format import StateFormat as StateFormat
from ._storage.scaled import ScaledFloat8 as ScaledFloat8
from ._storage.scaled import ScaledFloat16 as ScaledFloat16
from ._storage.split import SplitBfloat16 as SplitBfloat16
from ._telemetry import telemetry as telemetry
from ._version import __version__ as __version__
from ._wrappers.compensated import Compensated as Compensated
from ._wrappers.offloaded import Offloaded as Offloaded
