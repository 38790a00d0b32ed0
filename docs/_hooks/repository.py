"""Links the pages to the repository, if pyproject.toml has its address."""

import pathlib
import tomllib
from typing import Any


def on_config(config: Any) -> Any:
    path = pathlib.Path(config.config_file_path).with_name("pyproject.toml")
    tool = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]
    address = tool["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    config.repo_url = address or None
    return config
