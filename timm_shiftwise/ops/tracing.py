"""Whether a call is being recorded into a graph that will run without this package."""
import torch


def graph_leaves_python() -> bool:
    """Whether ``torch.jit.trace``, ``torch.export`` or an exporter to ONNX is recording PyTorch's own operators."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
