"""Command-line options of the examples that train the language model."""

import dataclasses
from pathlib import Path
from typing import Literal


OptimizerName = Literal["adamw", "ademamix"]

# The best of 2e-3, 4e-3, 8e-3, and 16e-3 for both (`benchmarks/train_better.py`).
_LEARNING_RATES: dict[OptimizerName, float] = {"adamw": 8e-3, "ademamix": 8e-3}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text, the size of the model, and the size of the batches."""

    data: Path | None = None
    """A text file or a folder of text files.
    The default is the source code of Python's standard library."""
    width: int = 64
    """The size of the hidden vectors of the transformer."""
    depth: int = 2
    """The number of transformer blocks."""
    heads: int = 4
    """The number of attention heads. It must divide the width."""
    context: int = 64
    """The number of bytes that the model sees at once."""
    batch_size: int = 16
    """The number of text windows in each batch, over all devices."""
    seed: int = 0
    """The seed for the initial weights, the batches, and the generated text."""

    def __post_init__(self):
        for name in ("width", "depth", "heads", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be >= 0")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}"
            )


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Trains a byte-level transformer on text."""

    out: Path = Path("runs/language_model")
    """The folder for checkpoints and the plot."""
    plot: Path | None = None
    """Path of the loss plot. The default is OUT/loss.png."""
    resume: bool = False
    """Continue from the newest complete checkpoint in OUT. The results are the same,
    bit for bit. A different --steps makes the run longer or shorter: the warm-ups
    continue from their current values, and the learning rate follows its new
    schedule."""
    compare: bool = False
    """Train with AdamW and with AdEMAMix, from the same weights on the same batches."""
    optimizer: OptimizerName = "ademamix"
    """The optimizer to train with. Ignored with --compare."""
    log_every: int = 10
    """The number of steps between two rows of the log, OUT/OPTIMIZER.csv."""
    tensorboard: bool = False
    """Also log for TensorBoard, to OUT/tensorboard."""
    steps: int = 8000
    """The number of steps. Every schedule spans all of them."""
    learning_rate: float | None = None
    """The peak learning rate. The default, 8e-3, works well for both optimizers."""
    alpha: float = 5.0
    """AdEMAMix: the final weight of the slow average of the gradients."""
    b3: float = 0.999
    """AdEMAMix: the final decay rate of the slow average."""
    weight_decay: float = 0.1
    """The weight decay. It applies to matrices, but not to biases or norms."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 1")
        for name in ("peak_learning_rate", "alpha", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 0")
        if not 0 <= self.b3 < 1:
            raise ValueError(f"b3 is {self.b3}, but must be in [0, 1)")

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is None:
            return _LEARNING_RATES[self.optimizer]
        return self.learning_rate

    @property
    def settings(self) -> dict[str, float | str]:
        """Everything that affects the results, except the text."""
        settings = dataclasses.asdict(self)
        others = (
            "data",
            "out",
            "plot",
            "resume",
            "compare",
            "log_every",
            "tensorboard",
        )
        for name in others:
            del settings[name]
        return {**settings, "learning_rate": self.peak_learning_rate}
