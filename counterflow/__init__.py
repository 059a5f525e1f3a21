"""counterflow: train DeepSeek-V3-style mixture-of-experts models, computation against
communication.

Rooms: `parallel` (how the work is divided and ordered), `comm` (how bytes move), `fp8` (how numbers
are stored and multiplied), `model` (the architecture), `launch` (how a run starts, lives and ends).
Importing this package imports none of
them, so it needs neither torch nor a GPU.
"""

__version__ = "0.1.0"
