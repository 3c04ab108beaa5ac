"""What is installed, on what it runs, and how operators would be computed here."""
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants

import timm_shiftwise
from timm_shiftwise.ops.backend import explain_backend
from timm_shiftwise.ops.taichi.runtime import LANES
from timm_shiftwise.profile import profile_model

from .enabled import is_enabled

EXAMPLE = 'sw_tiny'
"""The network whose ways are told."""

_PACKAGES = (
    'torch', 'torchvision', 'timm', 'taichi', 'triton', 'huggingface_hub', 'safetensors', 'numpy', 'onnxruntime',
)


def facts() -> Iterator[tuple[str, str]]:
    """Names and values, for people."""
    yield 'timm-shiftwise', f'{timm_shiftwise.__version__} in {Path(timm_shiftwise.__file__).parent}'
    yield 'enabled without import', 'yes' if is_enabled() else 'no (timm-shiftwise enable)'
    yield 'Python', f'{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}'
    for package in _PACKAGES:
        yield package, _version(package)
    capability = torch.backends.cpu.get_cpu_capability()
    yield 'processor', f'{os.cpu_count()} cores, {capability}, {torch.get_num_threads()} threads of PyTorch'
    yield 'lanes of Taichi kernels', f'{LANES} numbers of float32'
    devices = [torch.device('cpu'), *_accelerators()]
    for device in devices[1:]:
        yield str(device), _name(device)
    if len(devices) == 1:
        yield 'accelerators', 'none that PyTorch sees'
    for name, value in sorted(os.environ.items()):
        if re.match('TIMM_SHIFTWISE_|HF_HUB_|HF_HOME|HF_ENDPOINT|TI_|CUDA_VISIBLE_DEVICES', name):
            yield f'${name}', value
    yield 'cache of weights', constants.HF_HUB_CACHE
    for device in devices:
        yield f'Taichi on {device}', _backend(device)
    for device in devices:
        for stage in profile_model(EXAMPLE, device=device).stages:
            yield f'{EXAMPLE}, {device}, stage {stage.stage}', f'{stage.way.name}: {stage.way.reason}'


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


def _accelerators() -> list[torch.device]:
    if not torch.accelerator.is_available():
        return []
    current = torch.accelerator.current_accelerator()
    assert current is not None
    return [torch.device(current.type, index) for index in range(torch.accelerator.device_count())]


def _name(device: torch.device) -> str:
    if device.type != 'cuda':
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f'{properties.name}, {properties.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}'


def _backend(device: torch.device) -> str:
    try:
        choice = explain_backend(None, device)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return f'{"runs" if choice.backend == "taichi" else "does not run"}: {choice.reason}'
