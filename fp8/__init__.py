"""How numbers are stored in eight bits: E4M3 with a scale for each tile of 128.

May import torch; knows nothing of pipelines, communication or models.
"""

from .tiles import TILE, dequantize_tiles, quantize_tiles

__all__ = ["TILE", "dequantize_tiles", "quantize_tiles"]
