"""To and from other optimizers: optax, PyTorch, and runs that change their plan."""
