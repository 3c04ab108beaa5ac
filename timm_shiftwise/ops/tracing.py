"""Whether a call is being recorded into a graph that will run without this package."""
import torch


def graph_leaves_python() -> bool:
    """Whether ``torch.jit.trace``, ``torch.export`` or an exporter to ONNX is recording PyTorch's own operators."""
    if torch.jit.is_tracing():
        return True
    # before torch 2.12 is_exporting() is true of whatever torch.compile compiles; the flag behind it is not
    return torch.compiler.is_exporting() and getattr(torch.compiler, '_is_exporting_flag', True)
