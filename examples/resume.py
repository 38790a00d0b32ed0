"""Kills a run halfway, resumes it, and compares it with an uninterrupted run.

To list the options, run `python examples/resume.py --help`.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
import tyro
from _digits import Batch, batch, mean_loss, read_digits
from _plot import save_figure, smooth
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a classifier of handwritten digits twice: once in a single process, and
    once in two processes, the first of which is killed."""

    steps: int = 2000
    """The number of steps. Every schedule spans all of them."""
    save_every: int = 100
    """The number of steps between checkpoints."""
    out: Path = Path("runs/resume")
    """The folder for the checkpoints and the plot."""
    checkpoint: Path | None = None
    """Only train. Start from this checkpoint if it exists, and save to it."""
    kill_at: int | None = None
    """With --checkpoint: send SIGKILL to this process after this step."""

    def __post_init__(self):
        if not 2 <= 2 * self.save_every <= self.steps:
            raise ValueError(
                f"save_every is {self.save_every}, but must lie in [1, steps / 2]"
            )


@eqx.filter_jit(donate="all-except-first")
def train_step(
    kept: tuple[eqx_ademamix.AdEMAMix, Batch],
    model: eqx.nn.MLP,
    state: eqx_ademamix.AdEMAMixState,
) -> tuple[eqx.nn.MLP, eqx_ademamix.AdEMAMixState, Float[Array, ""]]:
    optim, data = kept
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, data)
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    return eqx.apply_updates(model, updates), state, loss


class Run(NamedTuple):
    """Everything that changes during a run. This is what a checkpoint holds."""

    model: eqx.nn.MLP
    state: eqx_ademamix.AdEMAMixState
    step: np.int64
    losses: Float[np.ndarray, " steps"]  # NaN for the steps to come


def start(steps: int) -> tuple[eqx_ademamix.AdEMAMix, Run]:
    """Creates the optimizer and the initial run. Each process does this again."""
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    optim = eqx_ademamix.AdEMAMix(
        optax.cosine_decay_schedule(1e-3, steps),
        b3=eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=steps),
        alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=steps),
        weight_decay=0.1,
        weight_decay_mask=eqx_ademamix.decay_mask(model),
    )
    losses = np.full(steps, np.nan, np.float32)
    return optim, Run(model, eqx_ademamix.init(optim, model), np.int64(0), losses)


def train(config: Config, checkpoint: Path) -> None:
    """Trains to the last step. Starts from the checkpoint if it exists."""
    optim, run = start(config.steps)
    if checkpoint.exists():
        run = eqx_ademamix.load(checkpoint, run, optim=optim)
    model, state, done, losses = run
    digits = read_digits()
    for step in range(int(done) + 1, config.steps + 1):
        data = batch(digits.train, 64, 0, step)  # depends only on the step
        model, state, loss = train_step((optim, data), model, state)
        losses[step - 1] = loss
        if step % config.save_every == 0 or step == config.steps:
            run = Run(model, state, np.int64(step), losses)
            eqx_ademamix.save(checkpoint, run, optim=optim)
        if step == config.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train_elsewhere(config: Config, checkpoint: Path, *args: str) -> int:
    """Trains in a separate process. Returns its exit code."""
    options = ("--steps", config.steps, "--save-every", config.save_every)
    command = [sys.executable, __file__, *map(str, options), "--checkpoint", checkpoint]
    return subprocess.run([*command, *args], check=False).returncode


def plot(path: Path, peace: list[float], resumed: list[float], saved: int, killed: int):
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(*smooth(peace), color="tab:gray", linewidth=4, label="uninterrupted")
    axes.semilogy(*smooth(resumed), color="tab:red", linewidth=1.2, label="resumed")
    for step, name in ((saved, "checkpoint "), (killed, " killed")):
        axes.axvline(step, color="black", linewidth=0.8, linestyle="--", zorder=0)
        side = "right" if step == saved else "left"
        top = axes.get_xaxis_transform()  # y is a fraction of the axes height
        axes.text(step, 0.96, name, va="top", ha=side, transform=top)
    axes.set(xlabel="step", ylabel="training loss (nats)")
    axes.legend(frameon=False, loc="lower left")
    save_figure(figure, path)


def demonstrate(config: Config) -> None:
    peace, killed = (config.out / f"{i}.safetensors" for i in ("peace", "killed"))
    for path in (peace, killed):
        path.unlink(missing_ok=True)
    kill_at = config.steps // 2 + config.save_every // 2
    optim, like = start(config.steps)

    train(config, peace)
    code = train_elsewhere(config, killed, "--kill-at", str(kill_at))
    saved = int(eqx_ademamix.load(killed, like, optim=optim).step)
    print(f"killed by {signal.Signals(-code).name} after step {kill_at}")
    print(f"resumed from the last checkpoint, at step {saved}")
    train_elsewhere(config, killed)

    run, run_2 = (eqx_ademamix.load(i, like, optim=optim) for i in (peace, killed))
    print(f"last loss, uninterrupted: {float(run.losses[-1])!r}")
    print(f"last loss, resumed:       {float(run_2.losses[-1])!r}")
    same = np.array_equal(run.losses, run_2.losses)
    print(f"losses of all steps identical bit for bit: {same}")
    same = bool(eqx.tree_equal(run, run_2))
    print(f"model and state identical bit for bit: {same}")
    image = config.out / "resume.png"
    plot(image, run.losses.tolist(), run_2.losses.tolist(), saved, kill_at)
    print(f"Plot saved to {image}")


def main() -> None:
    config = tyro.cli(Config)
    if config.checkpoint is None:
        demonstrate(config)
    else:
        train(config, config.checkpoint)


if __name__ == "__main__":
    main()
