"""How a moment is stored between two steps: codecs, and which leaf gets which."""
