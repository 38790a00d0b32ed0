"""Switches from AdamW to AdEMAMix halfway through a run, in a few minutes on a CPU.

The first half of the steps uses AdamW. Then the run continues twice on the same
batches: once with AdamW, and once with AdEMAMix, which starts from AdamW's state. The
model and the text are those of `train_language_model.py`. To list the options, run
`python examples/switch_from_adamw.py --help`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TypeVar

import equinox as eqx
import jax
import tyro
from _config import Config, OptimizerName
from _interrupt import Interrupt, Interrupted
from _plot import plot_switch
from _text import DataError, Text, read_text
from train_language_model import Run, make_schedule
from tyro.conf import Fixed, Suppress

import eqx_ademamix


Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class SwitchConfig(Config):
    """Trains a byte-level transformer with AdamW and switches to AdEMAMix halfway.
    Compares the result with AdamW alone."""

    out: Path = Path("runs/switch")
    plot: Path | None = None
    """Path of the loss plot. The default is OUT/switch.png."""
    steps: int = 8000
    """The number of steps. The switch comes after half of them."""
    seed: int = 0
    """The seed for the initial weights and the batches."""
    # Options of the other example that this one does not have.
    resume: Suppress[Fixed[bool]] = False
    compare: Suppress[Fixed[bool]] = False
    optimizer: Suppress[Fixed[OptimizerName]] = "adamw"

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, but must be >= 2 (two halves)")


def copy_arrays(tree: Tree) -> Tree:
    """Copies the arrays of a tree, because a training step overwrites its model."""
    return jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)


def switch_to_ademamix(run: Run) -> Run:
    """Continues an AdamW run with AdEMAMix. The AdamW run can continue too."""
    config = dataclasses.replace(run.config, optimizer="ademamix")
    switched = Run(config, run.text)
    switched.name = "switched"
    switched.train_losses = list(run.train_losses)
    switched.validation_losses = list(run.validation_losses)
    switched.model = copy_arrays(run.model)

    steps_left = config.steps - len(run.train_losses)
    optim = eqx_ademamix.AdEMAMix(
        # Continues from where it was, because it counts from AdamW's first step.
        make_schedule(run.config),
        # Start now, because they count the steps of the slow average, which is new.
        b3=eqx_ademamix.beta3_scheduler(config.b3, 0.9, warmup=steps_left),
        alpha=eqx_ademamix.alpha_scheduler(config.alpha, 0.0, warmup=steps_left),
        weight_decay=config.weight_decay,
        weight_decay_mask=eqx_ademamix.decay_mask(run.model),
    )
    switched.optim = optim
    switched.state = eqx_ademamix.from_adamw(run.state, optim, switched.model)
    return switched


def train(config: Config, text: Text, interrupt: Interrupt) -> tuple[Run, Run]:
    """Returns the AdamW run and the run that switched to AdEMAMix halfway."""
    adamw = Run(config, text)
    adamw.train(interrupt, until=config.steps // 2)
    switched = switch_to_ademamix(adamw)
    for run in (adamw, switched):
        run.train(interrupt, until=config.steps)
    return adamw, switched


def report(config: Config, adamw: Run, switched: Run) -> None:
    """Plots the losses and prints those after the switch."""
    switch = config.steps // 2
    plot = config.plot or config.out / "switch.png"
    plot_switch(plot, adamw.curve(), switched.curve(), switch)
    print(f"Loss plot saved to {plot}\n")

    print("validation loss (nats per byte)")
    print("  step   AdamW  AdEMAMix  difference")
    pairs = zip(adamw.validation_losses, switched.validation_losses, strict=True)
    for (step, alone), (_, loss) in pairs:
        if step >= switch:
            print(f"{step:>6}  {alone:.4f}    {loss:.4f}     {loss - alone:+.4f}")
    _, alone = adamw.validation_losses[-1]
    _, loss = switched.validation_losses[-1]
    print(f"\nvalidation loss after the switch: {loss:.4f} (AdamW alone: {alone:.4f})")


def main() -> int:
    config = tyro.cli(SwitchConfig)
    try:
        text = read_text(config.data, config.context)
        adamw, switched = train(config, text, Interrupt())
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(interrupted)
        return 130
    report(config, adamw, switched)
    return 0


if __name__ == "__main__":
    sys.exit(main())
