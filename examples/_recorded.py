"""What a loss of the language model means, compared with recorded runs of AdamW."""

import json
from pathlib import Path
from typing import Any

from _config import Config


RUNS = Path(__file__).parent.parent / "docs" / "train_better.jsonl"


def meaning(config: Config, fingerprint: str) -> str:
    """What to compare the final loss with."""
    wanted: dict[str, Any] = {**config.settings, "optimizer": "adamw"}
    texts = recorded_losses(wanted)
    if config.data or not texts:
        return "To compare this loss with that of AdamW, use --compare."
    text = fingerprint if fingerprint in texts else next(iter(texts))
    lines = [
        "The loss is the mean over the held-out files (every tenth) of Python's",
        "standard library, in nats per byte. In a recorded run with the same settings,",
        f"AdamW ended at {texts[text]:.4f}. Rounding alone has changed such a loss by",
        "0.011, so one run cannot tell them apart: see docs/reproductions.md.",
    ]
    if text != fingerprint:
        lines += [
            "The text of that run was slightly different, because the library depends",
            "on the version of Python.",
        ]
    lines += [
        "The README's plot has losses on one half of these files, the half that was",
        "not used to choose the learning rate. They are lower.",
    ]
    return "\n".join(lines)


def recorded_losses(settings: dict[str, Any]) -> dict[str, float]:
    """The final losses of the recorded runs with these settings, by text."""
    found: dict[str, float] = {}
    for line in RUNS.read_text().splitlines():
        run = json.loads(line)
        text = run["settings"].pop("text")
        if run["settings"] == settings:
            _, first, second = run["losses"][-1]  # on the halves of the held-out text
            found[text] = (first + second) / 2
    return found
