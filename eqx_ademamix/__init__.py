"""AdEMAMix for Equinox models: typed hyperparameters, typed state, right numbers."""

from ._ademamix import AdEMAMix as AdEMAMix
from ._ademamix import AdEMAMixState as AdEMAMixState
from ._ademamix import Hyperparams as Hyperparams
from ._ademamix import hyperparams as hyperparams
from ._formats import StateFormat as StateFormat
from ._masks import decay_mask as decay_mask
from ._masks import decay_report as decay_report
from ._optimizer import AbstractOptimizer as AbstractOptimizer
from ._optimizer import init as init
from ._optimizer import update as update
from ._schedules import AlphaSchedule as AlphaSchedule
from ._schedules import Beta3Schedule as Beta3Schedule
from ._schedules import alpha_scheduler as alpha_scheduler
from ._schedules import beta3_scheduler as beta3_scheduler
from ._version import __version__ as __version__
