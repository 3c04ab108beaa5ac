"""What autocast does to the input of PyTorch's convolutions, for operators that it does not know."""
import torch
from torch import Tensor


def in_autocast_dtype(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on, else as it is; float64 stays, as PyTorch lets it."""
    if torch.jit.is_scripting():
        return x
    else:
        # PyTorch refuses the question for the meta device
        if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))
