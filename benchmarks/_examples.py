"""The model, data, and training code of the examples, for use in the benchmarks.

The examples are scripts in one folder and import each other by name.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "examples"))

from _config import Config as Config
from _config import OptimizerName as OptimizerName
from _interrupt import Interrupt as Interrupt
from _text import DataError as DataError
from _text import Text as Text
from _text import Windows as Windows
from _text import read_text as read_text
from _text import training_batch as training_batch
from _text import validation_batches as validation_batches
from _transformer import Transformer as Transformer
from compact_state import cast as cast
from switch_from_adamw import copy_arrays as copy_arrays
from train_language_model import TITLES as TITLES
from train_language_model import Run as Run
from train_language_model import mean_loss as mean_loss
from train_language_model import train_step as train_step
from train_language_model import validation_loss as validation_loss
