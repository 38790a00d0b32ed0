"""Optimizers in PyTorch, if they are installed. They run in the same process."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import cases
from .measure import Absent
from .trees import Tree


class Peer(NamedTuple):
    """The module that must be installed, and how its optimizer is made."""

    module: str
    make: Callable[[Any, list[Any]], Any]


PEERS = {
    cases.TORCH: Peer(
        "torch",
        lambda module, params: module.optim.AdamW(params, lr=1e-3, fused=True),
    ),
    cases.PYTORCH_OPTIMIZER: Peer(
        "pytorch_optimizer", lambda module, params: module.AdEMAMix(params, lr=1e-3)
    ),
    cases.BITSANDBYTES: Peer(
        "bitsandbytes",
        lambda module, params: module.optim.AdEMAMix8bit(params, lr=1e-3),
    ),
}


class TorchRun:
    """A step of an optimizer in PyTorch, on the gradients of the JAX sides."""

    facts: dict[str, float]

    def __init__(self, name: str, grads: Tree):
        peer = PEERS[name]
        if importlib.util.find_spec(peer.module) is None:
            raise Absent("not installed")
        try:
            self._optim = peer.make(
                importlib.import_module(peer.module), _params(grads)
            )
            self._optim.step()
            self.facts = {"state": _state_bytes(self._optim)}
        except Exception as error:
            raise Absent(f"does not run here: {_first_line(error)}") from error

    def __call__(self) -> None:
        self._optim.step()

    def wait(self) -> None:
        """On a CPU, the step has ended when the call returns."""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _params(grads: Tree) -> list[Any]:
    torch: Any = importlib.import_module("torch")
    found: list[Any] = []
    for grad in grads.values():
        param = torch.nn.Parameter(torch.ones(grad.shape))
        param.grad = torch.from_numpy(np.array(grad))
        found.append(param)
    return found


def _state_bytes(optim: Any) -> float:
    """Bytes of state per parameter."""
    params = [p for group in optim.param_groups for p in group["params"]]
    values = [x for state in optim.state.values() for x in state.values()]
    arrays = [x for x in values if hasattr(x, "nbytes")]
    return sum(x.nbytes for x in arrays) / sum(p.numel() for p in params)
