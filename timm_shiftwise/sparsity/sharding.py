"""Tensors of which every rank holds a part: those of a network under ``torch.distributed.fsdp.fully_shard``."""
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts of a tensor together, on every rank; a tensor that is not sharded is given back as it is.

    Every rank must call it, in the same order.
    """
    gather = getattr(tensor, 'full_tensor', None)
    return tensor if gather is None else gather()


def multiply(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor, or each rank's part of it, in place by a factor that every rank holds whole."""
    mesh = getattr(tensor, 'device_mesh', None)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, Replicate  # not imported before somebody shards
        factor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.mul_(factor)
