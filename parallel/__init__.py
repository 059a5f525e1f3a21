"""How the work is divided and ordered.

`mesh` lays ranks out, `schedule` orders the work as data, `simulate` predicts it, `pipeline`
executes it. May import `comm`; knows nothing of mixture-of-experts or of the model. The names below
are imported on first use, so that `counterflow.parallel.schedule` needs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chunk import Chunk, WeightGradQueue
    from .mesh import Mesh, MeshShape
    from .pipeline import Pipeline, PipelineError

_HOMES = {
    "Chunk": "chunk",
    "WeightGradQueue": "chunk",
    "Mesh": "mesh",
    "MeshShape": "mesh",
    "Pipeline": "pipeline",
    "PipelineError": "pipeline",
}
__all__ = ["Chunk", "Mesh", "MeshShape", "Pipeline", "PipelineError", "WeightGradQueue"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
