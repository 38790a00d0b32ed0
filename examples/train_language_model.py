"""Trains a byte-level transformer with AdEMAMix, in a few minutes on a CPU.

To list the options, run `python examples/train_language_model.py --help`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _config import Config
from _interrupt import Interrupt, Interrupted
from _log import Log
from _plot import Curve, plot_losses, plot_run
from _recorded import meaning
from _text import (
    DataError,
    Text,
    Windows,
    read_text,
    training_batch,
    validation_batches,
)
from _transformer import Transformer, generate
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

import eqx_ademamix
from eqx_ademamix import CheckpointError


Optimizer: TypeAlias = (
    eqx_ademamix.AbstractOptimizer[Any] | optax.GradientTransformation
)
Telemetry: TypeAlias = dict[str, Array]
TITLES = {"adamw": "AdamW", "ademamix": "AdEMAMix"}
REPORT_EVERY = 50  # steps
NUM_EVALUATIONS = 16  # a checkpoint is written after each of them
NO_LOSS = -1.0  # not NaN, which is the loss of a run that diverged


#
# The optimizers
#


def make_schedule(config: Config) -> optax.Schedule:
    """A linear learning-rate warm-up, then a cosine decay to 1% of the peak."""
    peak, steps = config.peak_learning_rate, config.steps
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, min(100, steps // 10), steps, end_value=0.01 * peak
    )


def make_optimizer(config: Config, model: Transformer) -> Optimizer:
    learning_rate = make_schedule(config)
    mask = eqx_ademamix.decay_mask(model)
    if config.optimizer == "adamw":
        return optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=mask)
    return eqx_ademamix.AdEMAMix(
        learning_rate,
        b3=eqx_ademamix.beta3_scheduler(config.b3, 0.9, warmup=config.steps),
        alpha=eqx_ademamix.alpha_scheduler(config.alpha, 0.0, warmup=config.steps),
        weight_decay=config.weight_decay,
        weight_decay_mask=mask,
    )


def warmup_starts(optim: Any) -> list[float]:
    """Where the warm-ups start: each step, and the value there."""
    b3, alpha = optim.b3, optim.alpha
    return [b3.begin, b3.beta_start, alpha.begin, alpha.alpha_start]


def with_new_length(
    optim: Optimizer, state: PyTree, config: Config, model: Transformer
) -> Optimizer:
    """The optimizer of a run that now ends after `config.steps` steps. The warm-ups
    continue from their current values, and the learning rate has its new schedule."""
    new = make_optimizer(config, model)
    if not isinstance(optim, eqx_ademamix.AdEMAMix):
        return new
    extended = eqx_ademamix.extend(optim, state, warmup=config.steps)
    return eqx.tree_at(warmup_starts, new, warmup_starts(extended))


#
# A step
#


clip = optax.clip_by_global_norm(0.5)


def mean_loss(model: Transformer, windows: Windows) -> Float[Array, ""]:
    """The mean cross-entropy of each byte, given the bytes before it, in nats."""
    text = jnp.asarray(windows, jnp.int32)
    logits = jax.vmap(model)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def one_step(
    windows: Windows, model: Transformer, state: PyTree, optim: Optimizer
) -> tuple[Transformer, PyTree, Float[Array, ""], tuple[PyTree, PyTree]]:
    """A step, with its gradients and updates."""
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, windows)
    grads, _ = eqx_ademamix.update(clip, grads, optax.EmptyState())
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    return eqx.apply_updates(model, updates), state, loss, (grads, updates)


@eqx.filter_jit(donate="all-except-first")
def train_step(
    windows: Windows, model: Transformer, state: PyTree, optim: Optimizer
) -> tuple[Transformer, PyTree, Float[Array, ""]]:
    model, state, loss, _ = one_step(windows, model, state, optim)
    return model, state, loss


@eqx.filter_jit(donate="all-except-first")
def logged_step(
    windows: Windows, model: Transformer, state: PyTree, optim: Optimizer
) -> tuple[Transformer, PyTree, Float[Array, ""], Telemetry]:
    """The same step, and what the log shows about it."""
    new_model, state, loss, (grads, updates) = one_step(windows, model, state, optim)
    numbers: Telemetry = {}
    if isinstance(optim, eqx_ademamix.AdEMAMix):
        numbers = eqx_ademamix.telemetry(
            optim, state, updates=updates, params=model, grads=grads
        )
    return new_model, state, loss, numbers


@eqx.filter_jit
def validation_loss(model: Transformer, batches: Windows) -> Float[Array, ""]:
    return jax.lax.map(lambda windows: mean_loss(model, windows), batches).mean()


#
# Checkpoints
#


def by_step(
    losses: Iterable[tuple[int, float | Array]], steps: int
) -> Float[np.ndarray, " steps"]:
    """An array with the losses of steps 1 to `steps`. It always has the same shape."""
    array = np.full(steps, NO_LOSS, np.float32)
    for step, loss in losses:
        array[step - 1] = loss
    return array


def pairs_of(array: Float[np.ndarray, " steps"]) -> list[tuple[int, float]]:
    """The inverse of `by_step`."""
    pairs = enumerate(array.tolist(), start=1)
    return [(step, loss) for step, loss in pairs if loss != NO_LOSS]


def planned_steps(checkpoint: Path) -> int:
    """The length of the run that wrote a checkpoint, which is in the file's name."""
    return int(checkpoint.stem.rpartition("-of-")[2])


#
# A run
#


class Run:
    """A training run: the model, the optimizer state, and the losses so far."""

    def __init__(self, config: Config, text: Text):
        self.config, self.text = config, text
        # What a resumed run must have in common with the run before it.
        self.settings = {**config.settings, "text": text.fingerprint}
        del self.settings["steps"]
        self.name: str = config.optimizer
        self.newest: Path | None = None  # the newest complete checkpoint
        key = jax.random.key(config.seed)
        self.model = Transformer(
            config.width, config.depth, config.heads, config.context, key=key
        )
        self.optim = make_optimizer(config, self.model)
        self.state = eqx_ademamix.init(self.optim, self.model)
        self.train_losses: list[float | Array] = []  # one per step
        self.validation_losses: list[tuple[int, float]] = []  # (step, loss) pairs
        self.log: Log | None = None  # while it trains, and afterward

    def review(self) -> None:
        """Prints what an expert would say about AdEMAMix. Usually, that is nothing."""
        if self.config.optimizer == "adamw":
            return
        members = [clip, self.optim]
        for sentence in eqx_ademamix.review(members, num_steps=self.config.steps):
            print(sentence, file=sys.stderr)

    def tree(self, steps: int) -> dict[str, Any]:
        """What a checkpoint holds for a run with a number of steps. `load` compares the
        settings and loads the rest."""
        self.train_losses = [float(loss) for loss in self.train_losses]
        train_losses = enumerate(self.train_losses, start=1)
        is_ours = isinstance(self.optim, eqx_ademamix.AdEMAMix)
        starts = warmup_starts(self.optim) if is_ours else []
        return {
            "settings": self.settings,
            "model": self.model,
            "state": self.state,
            "warmup_starts": np.asarray(starts, np.float64),
            "train_losses": by_step(train_losses, steps),
            "validation_losses": by_step(self.validation_losses, steps),
        }

    def checkpoints(self) -> list[Path]:
        """The files of this run and of those that it replaces, newest first."""
        pattern = f"{self.name}-*-of-*.safetensors"
        return sorted(self.config.out.glob(pattern), reverse=True)

    def save(self) -> None:
        """Saves a checkpoint and keeps the one before it."""
        step = len(self.train_losses)
        steps = self.config.steps
        path = self.config.out / f"{self.name}-{step:08}-of-{steps:08}.safetensors"
        eqx_ademamix.save(path, self.tree(steps), optim=self.optim)
        unfinished = self.config.out.glob(f".{self.name}-*.tmp")  # of killed processes
        for old in {*self.checkpoints(), *unfinished} - {path, self.newest}:
            old.unlink()
        self.newest = path

    def resume(self) -> None:
        """Continues from the newest complete checkpoint."""
        paths = self.checkpoints()
        if not paths:
            pattern = self.config.out / f"{self.name}-*.safetensors"
            raise CheckpointError(f"There is no checkpoint {pattern} to resume from.")
        self.newest, tree = self.load_newest(paths)
        self.model, self.state = tree["model"], tree["state"]
        self.train_losses = [loss for _, loss in pairs_of(tree["train_losses"])]
        self.validation_losses = pairs_of(tree["validation_losses"])
        if planned_steps(self.newest) != self.config.steps:
            self.change_length(self.newest)

    def load_newest(self, paths: list[Path]) -> tuple[Path, dict[str, Any]]:
        """Loads the first complete file."""
        errors: list[CheckpointError] = []
        for path in paths:
            try:
                tree = self.load(path)
            except CheckpointError as error:
                errors.append(error)
                continue
            if errors:
                print(f"{errors[0]} This run resumes from {path}.", file=sys.stderr)
            return path, tree
        raise errors[0]

    def load(self, path: Path) -> dict[str, Any]:
        """Loads a checkpoint and the optimizer as it was then."""
        steps = planned_steps(path)
        tree = eqx_ademamix.load(path, self.tree(steps))
        planned = dataclasses.replace(self.config, steps=steps)
        self.optim = make_optimizer(planned, self.model)
        if isinstance(self.optim, eqx_ademamix.AdEMAMix):
            starts = tree["warmup_starts"].tolist()
            self.optim = eqx.tree_at(warmup_starts, self.optim, starts)
        return eqx_ademamix.load(path, tree, optim=self.optim)

    def change_length(self, checkpoint: Path) -> None:
        """Makes the run that wrote a checkpoint end after a different number of
        steps."""
        planned, steps = planned_steps(checkpoint), self.config.steps
        done = len(self.train_losses)
        if steps <= done:
            raise CheckpointError(
                f"--steps is {steps}, but {checkpoint} has already taken {done} steps. "
                f"Pass a larger number, or --steps {planned} as before."
            )
        print(f"This run now ends after {steps} steps instead of {planned}.")
        self.optim = with_new_length(self.optim, self.state, self.config, self.model)

    def train(self, interrupt: Interrupt, until: int) -> None:
        """Takes the remaining steps, up to and including step `until`."""
        steps, done = self.config.steps, len(self.train_losses)
        held_out = validation_batches(self.text.validation, self.config.context)
        title = TITLES[self.config.optimizer]
        bar_format = "{desc} {n_fmt}/{total_fmt} {remaining} left{postfix}"
        bar = tqdm(total=until, initial=done, desc=title, bar_format=bar_format)
        self.log = self.open_log(done)
        with contextlib.closing(self.log), bar:
            for step in range(done + 1, until + 1):
                self.step(step)
                if step % REPORT_EVERY == 0 or step == until:
                    bar.update(step - bar.n)
                    bar.set_postfix(self.figures())
                is_last = interrupt.requested
                if step % max(1, steps // NUM_EVALUATIONS) == 0 or step == until:
                    self.validation_losses.append((step, self.validate(held_out)))
                    self.save()
                elif is_last:
                    self.save()
                if is_last:
                    raise Interrupted(f"Stopped after {step} of {steps} steps.")

    def open_log(self, done: int) -> Log:
        out = self.config.out
        events = out / "tensorboard" / self.name if self.config.tensorboard else None
        return Log(out / f"{self.name}.csv", done, events)

    def step(self, step: int) -> None:
        """Takes one step without waiting for it to finish, unless it is logged."""
        size, context = self.config.batch_size, self.config.context
        windows = training_batch(self.text.train, size, context, self.config.seed, step)
        args = windows, self.model, self.state, self.optim
        if self.log is None or step % self.config.log_every:
            self.model, self.state, loss = train_step(*args)
        else:
            self.model, self.state, loss, numbers = logged_step(*args)
            self.log.add(step, {"loss": loss, **numbers})
        self.train_losses.append(loss)

    def validate(self, held_out: Windows) -> float:
        return float(validation_loss(self.model, held_out))

    def figures(self) -> dict[str, str]:
        """The values that the progress bar shows. They fit into 80 columns."""
        recent = [float(loss) for loss in self.train_losses[-REPORT_EVERY:]]
        if isinstance(self.optim, eqx_ademamix.AdEMAMix):
            h = eqx_ademamix.hyperparams(self.optim, self.state)
            lr, shown = (
                h.learning_rate,
                {"alpha": f"{h.alpha:.2f}", "b3": f"{h.b3:.4f}"},
            )
        else:
            lr, shown = make_schedule(self.config)(len(self.train_losses)), {}
        return {"loss": f"{np.mean(recent):.3f}", "lr": f"{lr:.1e}", **shown}

    def curve(self) -> Curve:
        """The losses that the plot shows."""
        losses = [float(loss) for loss in self.train_losses]
        return Curve(TITLES[self.config.optimizer], losses, self.validation_losses)


def report(config: Config, runs: list[Run]) -> None:
    """Plots and prints the losses. After a single run, also generates some text."""
    curves = [run.curve() for run in runs]
    plot = config.plot or config.out / "loss.png"
    plot_losses(plot, curves)
    print(f"Loss plot saved to {plot}")
    rows = runs[-1].log.rows if runs[-1].log else []
    if rows and runs[-1].name == "ademamix":
        plot_run(config.out / "run.png", rows)
        print(f"Plot of the log saved to {config.out / 'run.png'}")
    print()
    if config.compare:
        print("optimizer  learning rate  validation loss (nats per byte)")
        for run, curve in zip(runs, curves, strict=True):
            rate, loss = run.config.peak_learning_rate, curve.validation[-1][1]
            print(f"{curve.label:<9}  {rate:<13g}  {loss:.4f}")
        half_life = eqx_ademamix.half_life(config.b3)
        if config.steps < 10 * half_life:
            print(
                f"\nWith b3={config.b3:g}, the slow average has a half-life of "
                f"{half_life:.0f} steps.\nA run of {config.steps} steps is too short "
                "to compare the two optimizers."
            )
    else:
        key = jax.random.key(config.seed)
        sample = generate(runs[0].model, b"def ", 400, 0.8, key)
        print(bytes(sample.tolist()).decode(errors="replace"))
        print(f"\n{meaning(config, runs[0].text.fingerprint)}")
    print(f"\nvalidation loss: {curves[-1].validation[-1][1]:.4f}")


def main() -> int:
    config = tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))
    interrupt = Interrupt()
    names = ("adamw", "ademamix") if config.compare else (config.optimizer,)
    try:
        text = read_text(config.data, config.context)
        runs = [Run(dataclasses.replace(config, optimizer=i), text) for i in names]
        for run in runs:
            if config.resume:
                run.resume()
            else:
                run.review()
                run.save()  # so that even a very short run can be resumed
        for run in runs:
            run.train(interrupt, config.steps)
    except (DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"{interrupted} To continue, run the same command with --resume.")
        return 130
    report(config, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
