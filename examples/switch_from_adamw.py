"""Goes over from AdamW to AdEMAMix in the middle of a run, on a CPU in a few minutes.

Half of the steps are AdamW's. From there the run goes on twice, on the same batches:
with AdamW alone, and with AdEMAMix, which takes AdamW's state over. It trains what
`train_language_model.py` trains. For the options:
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
    """Trains a byte-level transformer with AdamW, and from the middle on with AdEMAMix,
    beside AdamW alone."""

    out: Path = Path("runs/switch")
    plot: Path | None = None
    """Where to draw the losses. By default OUT/switch.png."""
    steps: int = 8000
    """The number of steps, half of them before the switch."""
    seed: int = 0
    """Decides on the initial weights and the batches."""
    # Options of the other example that this one has not.
    resume: Suppress[Fixed[bool]] = False
    compare: Suppress[Fixed[bool]] = False
    optimizer: Suppress[Fixed[OptimizerName]] = "adamw"

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, but must be >= 2: two halves")


def copy_arrays(tree: Tree) -> Tree:
    """The same tree in memory of its own. A step of training overwrites its model."""
    return jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)


def switch_to_ademamix(run: Run) -> Run:
    """Goes on with AdEMAMix where a run of AdamW is. That run can go on, too."""
    config = dataclasses.replace(run.config, optimizer="ademamix")
    switched = Run(config, run.text)
    switched.checkpoint = config.out / "switched.eqx"
    switched.train_losses = list(run.train_losses)
    switched.validation_losses = list(run.validation_losses)
    switched.model = copy_arrays(run.model)

    steps_left = config.steps - len(run.train_losses)
    optim = eqx_ademamix.AdEMAMix(
        # Goes on where it was: it counts the steps from AdamW's first.
        make_schedule(run.config),
        # Begin now: they count the steps of the slow average, which begins empty.
        b3=eqx_ademamix.beta3_scheduler(config.b3, 0.9, warmup=steps_left),
        alpha=eqx_ademamix.alpha_scheduler(config.alpha, 0.0, warmup=steps_left),
        weight_decay=config.weight_decay,
        weight_decay_mask=eqx_ademamix.decay_mask(run.model),
    )
    switched.optim = optim
    switched.state = eqx_ademamix.from_adamw(run.state, optim, switched.model)
    return switched


def train(config: Config, text: Text, interrupt: Interrupt) -> tuple[Run, Run]:
    """A run of AdamW, and the one that left it for AdEMAMix in the middle."""
    adamw = Run(config, text)
    adamw.train(interrupt, until=config.steps // 2)
    switched = switch_to_ademamix(adamw)
    for run in (adamw, switched):
        run.train(interrupt, until=config.steps)
    return adamw, switched


def report(config: Config, adamw: Run, switched: Run) -> None:
    """Draws the losses and prints those since the switch."""
    switch = config.steps // 2
    plot = config.plot or config.out / "switch.png"
    plot_switch(plot, adamw.curve(), switched.curve(), switch)
    print(f"Losses drawn in {plot}\n")

    print("validation loss (nats a byte)")
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
