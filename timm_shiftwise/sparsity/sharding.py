"""Tensors of which every rank holds a part: those of a network under ``torch.distributed.fsdp.fully_shard``."""
from typing import cast

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts of a tensor together, on every rank; a tensor that is not sharded is given back as it is.

    Every rank must call it, in the same order.
    """
    gather = getattr(tensor, 'full_tensor', None)
    return tensor if gather is None else gather()


def keep_only(tensor: Tensor, mask: Tensor) -> None:
    """Set to zero, in place, what a boolean mask that every rank holds whole leaves out; a NaN there is gone, too."""
    part, of_mask = _parts(tensor, mask)
    part.masked_fill_(~of_mask, 0)


def add(tensor: Tensor, summand: Tensor) -> None:
    """Add to a tensor, or to each rank's part of it, in place what every rank holds whole."""
    part, of_summand = _parts(tensor, summand)
    part.add_(of_summand)


def _parts(tensor: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a tensor, and of an operand that every rank holds whole."""
    mesh = getattr(tensor, 'device_mesh', None)
    if mesh is None:
        return tensor, operand
    from torch.distributed.tensor import DTensor, Replicate  # not imported before somebody shards
    sharded = cast(DTensor, tensor)
    everywhere = DTensor.from_local(operand.expand(tensor.shape), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return sharded.to_local(), everywhere.redistribute(placements=sharded.placements).to_local()
