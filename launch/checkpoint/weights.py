"""A model's weights as a checkpoint has them, by the names that all layouts share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from .pieces import Held, Piece

PARAMETERS, BUFFERS = "parameters/", "buffers/"


def weight_pieces(
    parameters: Mapping[str, nn.Parameter], held: Mapping[str, Held], parts: Iterable[nn.Module]
) -> Iterator[Piece]:
    """ "parameters/NAME" and "buffers/NAME"; the buffers that models save are routers' biases.

    Args:
        parameters: this rank's by name.
        held: how each of them lies in the whole model's.
        parts: this rank's modules, whose buffers are whole.
    """
    for name, parameter in parameters.items():
        yield from held[name].pieces(PARAMETERS + name, parameter.detach().view(-1))
    for part in parts:
        for name, buffer in _saved_buffers(part):
            yield from Held.entire(buffer).pieces(BUFFERS + name, buffer.view(-1))


def _saved_buffers(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
    for name, tensor in part.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield name, tensor
