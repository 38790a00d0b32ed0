"""What the suite measures. Edit this file to measure something else.

The cases run in this order, and none starts after the time budget is used up. So the
most important cases come first.
"""

from typing import NamedTuple


BASELINE = "optax.contrib.ademamix"
FLOAT32 = "AdEMAMix, float32"
HALF = "AdEMAMix, half"
COMPACT = "AdEMAMix, compact"
NO_M1 = "AdEMAMix, b1=0"
SIMPLIFIED = "SimplifiedAdEMAMix"
COMPENSATED = "Compensated, bfloat16"
ADAMW = "optax.adamw"
TORCH = "torch, fused AdamW"
PYTORCH_OPTIMIZER = "pytorch_optimizer, AdEMAMix"
BITSANDBYTES = "bitsandbytes, AdEMAMix8bit"
IN_PLACE = "bound: in-place scale"
C_LOOP = "bound: C loop"

OURS = (FLOAT32, HALF, COMPACT, NO_M1, SIMPLIFIED, COMPENSATED)
PEERS = (ADAMW, TORCH, PYTORCH_OPTIMIZER, BITSANDBYTES)
BOUNDS = (IN_PLACE, C_LOOP)
ALL = (BASELINE, *OURS, *PEERS, *BOUNDS)
MAIN = (BASELINE, FLOAT32, COMPACT, ADAMW, *BOUNDS)
COMPILED = (BASELINE, FLOAT32, COMPACT, NO_M1)
# With 512 leaves, each of these takes most of a minute to compile.
SLOW_TO_COMPILE = (HALF, COMPENSATED)


def without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


# Loops around a small model.
AS_ARGUMENT = "AdEMAMix, float32, as an argument"
FLAT = "bound: jax.jit of flat tuples"
MAKE_STEP = "make_step"
EIGHT = "make_step, 8 steps per call"
PACKED = "make_step, packed"
PACKED_EIGHT = "make_step, packed, 8 steps per call"
LOOPS = (BASELINE, FLOAT32, AS_ARGUMENT, FLAT, MAKE_STEP, EIGHT, PACKED, PACKED_EIGHT)


# On a CPU, bitsandbytes takes seconds for a step of a large model.
FAST = without(ALL, (BITSANDBYTES,))
MANY_LEAVES = without(FAST, SLOW_TO_COMPILE)


class StepCase(NamedTuple):
    """A compiled step of a number of parameters, in leaves of one shape."""

    parameters: int
    leaves: int
    sides: tuple[str, ...] = ALL


class CompileCase(NamedTuple):
    """Tracing, lowering, and compiling a step, in a number of rounds."""

    leaves: int
    rounds: int
    sides: tuple[str, ...] = COMPILED


class HostCase(NamedTuple):
    """A whole training step of a model with small leaves."""

    leaves: int
    sides: tuple[str, ...] = LOOPS


class EagerCase(NamedTuple):
    """A step outside `jit`."""

    leaves: int
    sides: tuple[str, ...] = (BASELINE, FLOAT32, COMPACT)


class Plan(NamedTuple):
    """All cases of one run. Each field is named after the function that measures it."""

    step: tuple[StepCase, ...]
    host: tuple[HostCase, ...]
    compile: tuple[CompileCase, ...]
    eager: tuple[EagerCase, ...]
    seconds: float
    """How long the rounds of one case may take, beyond the minimum number of rounds."""
    least_rounds: int
    most_rounds: int


LARGE, LARGE_IN_MANY = 2**25, 2**23  # 33.6 M and 8.4 M

FULL = Plan(
    step=(
        StepCase(LARGE, 1, FAST),
        StepCase(LARGE, 64, FAST),
        StepCase(LARGE_IN_MANY, 512, MANY_LEAVES),
        *(StepCase(n, 1) for n in (10**4, 10**5, 10**6, 10**7)),
        *(StepCase(n, 64, MAIN) for n in (10**4, 10**5, 10**6, 10**7)),
        StepCase(10**8, 1, MAIN),
        StepCase(10**8, 64, MAIN),
        StepCase(10**8, 512, MANY_LEAVES),
        StepCase(10**4, 512, without(MANY_LEAVES, (COMPACT,))),
        StepCase(10**6, 512, MANY_LEAVES),
    ),
    host=(
        HostCase(4),
        HostCase(48),
        HostCase(200, LOOPS[:-1]),
    ),  # packing 200 leaves takes 40 s to compile
    compile=(
        CompileCase(16, 5),
        CompileCase(64, 2),
        CompileCase(512, 1),
        CompileCase(2000, 1, without(COMPILED, (COMPACT,))),
    ),
    eager=(
        EagerCase(64),
        EagerCase(512, (BASELINE, FLOAT32)),
        EagerCase(2000, (BASELINE, FLOAT32)),
    ),
    seconds=5.0,
    least_rounds=5,
    most_rounds=25,
)

SHORT = Plan(
    step=(
        StepCase(2**16, 1),
        StepCase(2**20, 1, (BASELINE, FLOAT32, NO_M1, ADAMW, *BOUNDS)),
        StepCase(2**20, 16, (BASELINE, FLOAT32, NO_M1, ADAMW, *BOUNDS)),
    ),
    host=(HostCase(4), HostCase(16)),
    compile=(
        CompileCase(4, 2, (BASELINE, FLOAT32, NO_M1)),
        CompileCase(16, 2, (BASELINE, FLOAT32, NO_M1)),
    ),
    eager=(EagerCase(4),),
    seconds=1.0,
    least_rounds=3,
    most_rounds=9,
)
