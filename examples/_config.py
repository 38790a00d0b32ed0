"""The command line of `train_language_model.py`."""

import dataclasses
from pathlib import Path
from typing import Literal


OptimizerName = Literal["adamw", "ademamix"]

# The best of 2e-3, 4e-3, 8e-3 and 16e-3 for both (`benchmarks/train_better.py`).
_LEARNING_RATES: dict[OptimizerName, float] = {"adamw": 8e-3, "ademamix": 8e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a byte-level transformer on text, by default on the source code of
    Python's standard library."""

    data: Path | None = None
    """A text file, or a folder of text files, to train on instead."""
    out: Path = Path("runs/language_model")
    """The folder for checkpoints and the plot."""
    plot: Path | None = None
    """Where to draw the losses. By default OUT/loss.png."""
    resume: bool = False
    """Go on from the checkpoint in the folder, to the same numbers bit for bit."""
    compare: bool = False
    """Train with AdamW and with AdEMAMix, from the same start on the same batches."""
    optimizer: OptimizerName = "ademamix"
    """What to train with if not comparing."""
    steps: int = 8000
    """The number of steps, which all schedules span."""
    learning_rate: float | None = None
    """The peak of the learning rate. By default 8e-3, which is good for both."""
    alpha: float = 5.0
    """AdEMAMix: the final weight of the slow average of the gradients."""
    b3: float = 0.999
    """AdEMAMix: the final decay of the slow average."""
    weight_decay: float = 0.1
    """Acts on matrices, neither on biases nor on norms."""
    width: int = 64
    """The size of the vectors that flow through the transformer."""
    depth: int = 2
    """The number of its blocks."""
    heads: int = 4
    """The number of attention heads, a divisor of the width."""
    context: int = 64
    """The number of bytes that it sees at once."""
    batch_size: int = 16
    """The number of windows of text in a batch."""
    seed: int = 0
    """Decides on the initial weights, the batches and the sample of text."""

    def __post_init__(self):
        for name in ("steps", "width", "depth", "heads", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 1")
        for name in ("peak_learning_rate", "alpha", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 0")
        if not 0 <= self.b3 < 1:
            raise ValueError(f"b3 is {self.b3}, but must be in [0, 1)")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is None:
            return _LEARNING_RATES[self.optimizer]
        return self.learning_rate

    @property
    def settings(self) -> dict[str, float | str]:
        """All that the numbers depend on, apart from the text."""
        settings = dataclasses.asdict(self)
        for name in ("data", "out", "plot", "resume", "compare"):
            del settings[name]
        return {**settings, "learning_rate": self.peak_learning_rate}
