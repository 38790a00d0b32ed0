"""Facts about the machine, for the top of a report."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


PACKAGES = ("jax", "jaxlib", "optax", "equinox", "eqx_ademamix")
OTHERS = ("torch", "pytorch_optimizer", "bitsandbytes")


def facts() -> dict[str, str]:
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{total_memory() / 2**30:.1f} GiB",
        "device": jax.devices()[0].device_kind,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        **{name: version for name in OTHERS if (version := _version(name))},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS") or "none",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """What can be used without swapping."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
