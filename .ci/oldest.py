"""Prints the oldest dependencies that pyproject.toml admits, as pip takes them."""

import pathlib
import tomllib


pyproject = pathlib.Path(__file__).parents[1] / "pyproject.toml"
project = tomllib.loads(pyproject.read_text())["project"]
extras = [project["optional-dependencies"][x] for x in ("checkpoint", "tensorboard")]
dependencies = [*project["dependencies"], *(x for extra in extras for x in extra)]
pins = [dependency.replace(">=", "==") for dependency in dependencies]
jaxlib = [pin.replace("jax==", "jaxlib==") for pin in pins if pin.startswith("jax==")]
print(*pins, *jaxlib)
