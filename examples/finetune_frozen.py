"""Freezes the layers of a trained network and trains a new head on a few images.

To list the options, run `python examples/finetune_frozen.py --help`.
"""

import dataclasses
from pathlib import Path
from typing import TypeAlias

import equinox as eqx
import jax
import tyro
from _digits import Batch, accuracy, batch, mean_loss, read_digits
from _plot import save_figure
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from matplotlib.figure import Figure

import eqx_ademamix


Curve: TypeAlias = list[tuple[int, float]]  # (step, accuracy) pairs


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains on all digits, then on a few images to tell odd digits from even ones."""

    steps: int = 300
    """The number of steps in each training run."""
    images: int = 20
    """The number of training images for the odd-or-even task."""
    seed: int = 0
    """The seed for the initial weights and the batches."""
    out: Path = Path("runs/finetune")
    """The folder for the plot."""


class Classifier(eqx.Module):
    """Layers that can be frozen, followed by a head."""

    body: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, num_labels: int, *, key: PRNGKeyArray):
        body_key, head_key = jax.random.split(key)
        self.body = eqx.nn.MLP(64, 64, width_size=128, depth=1, key=body_key)
        self.norm = eqx.nn.LayerNorm(64)
        self.head = eqx.nn.Linear(64, num_labels, key=head_key)

    def __call__(self, image: Float[Array, "64"]) -> Float[Array, " labels"]:
        return self.head(jax.nn.relu(self.norm(self.body(image))))


def train(
    config: Config, model: Classifier, trainable: PyTree, data: Batch, test: Batch
) -> tuple[Classifier, Curve]:
    """Returns the trained model and its accuracies during training."""
    optim = eqx_ademamix.AdEMAMix(
        1e-3,
        b3=eqx_ademamix.beta3_scheduler(0.99, 0.9, warmup=config.steps),
        alpha=eqx_ademamix.alpha_scheduler(2.0, warmup=config.steps),
        weight_decay=0.1,
        weight_decay_mask=eqx_ademamix.decay_mask(model),
        trainable=trainable,
    )
    step = eqx_ademamix.make_step(mean_loss, optim)  # unused gradients are not computed
    carry = step.init(model)
    _, state = step.unpack(carry)
    numbers = sum(x.size for x in jax.tree.leaves(state.m2))

    accuracies: Curve = []
    for i in range(1, config.steps + 1):
        carry, _ = step(carry, batch(data, 64, config.seed, i))
        if i % max(1, config.steps // 20) == 0:
            model, _ = step.unpack(carry)
            accuracies.append((i, float(accuracy(model, test))))
    print(f"{numbers:>6,} parameters trained, accuracy {accuracies[-1][1]:.4f}")
    return step.unpack(carry)[0], accuracies


def plot(path: Path, curves: dict[str, Curve]) -> None:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    colors = ("tab:gray", "tab:blue", "tab:red")
    for (label, curve), color in zip(curves.items(), colors, strict=True):
        steps, accuracies = zip(*curve, strict=True)
        label = f"{label}: {accuracies[-1]:.4f}"
        axes.plot(steps, accuracies, "o-", color=color, markersize=3.5, label=label)
    axes.set(xlabel="step", ylabel="accuracy on held-out images")
    axes.legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config)
    data = read_digits()
    few, held_out = ((images, labels % 2) for images, labels in data)
    few = jax.tree.map(lambda x: x[: config.images], few)
    keys = jax.random.split(jax.random.key(config.seed), 2)

    model = Classifier(10, key=keys[0])
    print(eqx_ademamix.decay_report(model, eqx_ademamix.decay_mask(model)))
    print("\nten digits, trained on all images")
    pretrained, _ = train(config, model, True, *data)

    fresh = Classifier(2, key=keys[1])
    start = eqx.tree_at(lambda model: model.head, pretrained, fresh.head)
    nothing = jax.tree.map(lambda _: False, start)
    only_head = eqx.tree_at(lambda model: model.head, nothing, replace=True)
    print(f"\nodd or even, trained on {config.images} images")
    curves: dict[str, Curve] = {}
    models: dict[str, Classifier] = {}
    for name, initial, trainable in (
        ("a new network", fresh, True),
        ("trained layers, new head", start, True),
        ("frozen layers, new head", start, only_head),
    ):
        print(f"{name:<24}", end="  ")
        models[name], curves[name] = train(config, initial, trainable, few, held_out)

    bodies = [(m.body, m.norm) for m in (models["frozen layers, new head"], pretrained)]
    print(f"\nfrozen layers identical bit for bit: {bool(eqx.tree_equal(*bodies))}")
    plot(config.out / "finetune.png", curves)
    print(f"Plot saved to {config.out / 'finetune.png'}")


if __name__ == "__main__":
    main()
