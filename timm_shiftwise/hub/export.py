"""A network as a file that runs without this package: ONNX, TorchScript or torch.export, compared before it is kept."""
import copy
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.utils import reparameterize_model
from torch import Tensor

from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.ops.files import replacing
from timm_shiftwise.profile.timing import time_calls

from .errors import HubError

FORMATS = ('onnx', 'torchscript', 'pt2')
"""What a network can be exported to."""

INT8_ALL, INT8_BUT_DEPTHWISE = 'int8', 'int8, depthwise in float'
LEAST_AGREEMENT = 0.95
"""Share of images of which a file in half precision or int8 must name the same class as PyTorch."""
_TOLERANCE = 1e-4  # of the largest logit, in single precision
_REPEATS = 10


@dataclass(frozen=True)
class Form:
    """One form of a network, compared with PyTorch in float32, unmerged or merged alike.

    Attributes:
        name: ``'float32'``, ``'float16'``, :data:`INT8_ALL` or :data:`INT8_BUT_DEPTHWISE`.
        error: Largest difference of a logit, as a share of the largest logit.
        agreement: Share of the images of which both name the same class.
        milliseconds: Median time of one image.
        times_pytorch: The same, over that of the merged network in PyTorch, measured by turns.
        megabytes: Size of the file.
    """
    name: str
    error: float
    agreement: float
    milliseconds: float
    times_pytorch: float
    megabytes: float


@dataclass(frozen=True)
class Export:
    """What came of an export.

    Attributes:
        file: The file.
        description: The file beside it, with labels and preprocessing.
        kept: The form that the file has.
        forms: All forms that were compared.
        images: Number of images that they were compared on.
    """
    file: Path
    description: Path
    kept: Form
    forms: tuple[Form, ...]
    images: int


def export(
        network: ShiftwiseNet, output: str | Path, to: str, images: Sequence[Tensor], *, dynamic: bool = False,
        half: bool = False, int8: bool = False, labels: Sequence[str] | None = None, seen: str = 'images',
        least_agreement: float = LEAST_AGREEMENT, overwrite: bool = False) -> Export:
    """Merge a network, export it, run the file and compare it with PyTorch; a file that disagrees is not kept.

    In int8 the network is quantised twice, whole and with its depthwise convolutions in float, which are faster so in
    some runtimes and closer in all: that one is kept if it is either.

    Args:
        network: The network, merged or not; it stays as it is.
        output: The file to write; a description is written beside it, with ``.json`` added to its name.
        to: One of :data:`FORMATS`.
        images: Images [3, H, W] as the network expects them, of one size; they are what is compared on, and what int8
            is calibrated with.
        dynamic: Whether the height and the width of an image are left open; the number of images always is.
        half: Whether weights and images are in float16.
        int8: Whether to quantise; for ONNX.
        labels: Names of the classes; None for those of ImageNet-1k if there are 1000.
        seen: What the images are, for people.
        least_agreement: Share of the images of which a file in half precision or int8 must name the same class.
        overwrite: Replace files that are there.

    Raises:
        HubError: If an argument does not fit, a package is missing, or the file disagrees with PyTorch.
        OSError: If a file cannot be written.
    """
    output = Path(output)
    description = output.with_name(f'{output.name}.json')
    if to not in FORMATS:
        raise HubError(f'to must be one of {", ".join(FORMATS)}, got {to!r}.')
    if (int8 and to != 'onnx') or (int8 and half):
        raise HubError('int8 is for ONNX, in place of half precision.')
    if len(images) < 1:
        raise HubError('There must be at least one image to compare on, got none.')
    if not 0 <= least_agreement <= 1:
        raise HubError(f'least_agreement must be between 0 and 1, got {least_agreement!r}.')
    if labels is not None and len(labels) != network.num_classes:
        raise HubError(f'There must be a label for each of {network.num_classes} classes, got {len(labels)}.')
    for path in (output, description):
        if path.exists() and not overwrite:
            raise HubError(f'{path} is there already; --overwrite replaces it.')
    if not output.parent.is_dir():
        raise HubError(f'The folder {output.parent} does not exist.')
    batch = torch.stack(list(images))
    merged = cast(ShiftwiseNet, reparameterize_model(copy.deepcopy(network).eval().float().cpu()))
    with torch.inference_mode():
        wanted = torch.cat([merged(image) for image in batch.split(1)])
    if not wanted.isfinite().all():
        raise HubError('The network gives logits that are not finite.')
    with TemporaryDirectory(prefix=f'.{output.name}.', dir=output.parent) as folder:
        made = Path(folder)
        files = _made(merged, batch, made, to, dynamic, half, int8)
        forms = {name: _compared(name, file, to, merged, batch, wanted) for name, file in files.items()}
        kept = _choose(forms)
        _refuse_disagreement(kept, seen, least_agreement)
        with replacing(description) as part:
            text = json.dumps(_described(network, output, to, dynamic, kept, list(forms.values()), labels, seen, batch),
                              indent=2, ensure_ascii=False)
            part.write_text(text + '\n', encoding='utf-8')
        files[kept.name].replace(output)
    return Export(output, description, kept, tuple(forms.values()), len(batch))


def _made(
        merged: ShiftwiseNet, batch: Tensor, folder: Path, to: str, dynamic: bool, half: bool,
        int8: bool) -> dict[str, Path]:
    """The files of each form."""
    network, example = (merged.half(), batch.half()) if half else (merged, batch)
    example = example[:1].expand(2, -1, -1, -1).contiguous()  # a single image would fix their number
    name = 'float16' if half else 'float32'
    file = folder / f'{name}.{to}'
    with _quiet():
        if to == 'torchscript':
            torch.jit.freeze(torch.jit.script(network)).save(str(file))
        else:
            axes = dict.fromkeys((0, 2, 3) if dynamic else (0,), torch.export.Dim.DYNAMIC)
            program = torch.export.export(network, (example,), dynamic_shapes=(axes,))
            if to == 'pt2':
                torch.export.save(program, file)
            else:
                _needed('onnx', 'onnxscript', 'onnxruntime')
                exported = torch.onnx.export(
                    program, dynamo=True, verbose=False, input_names=['image'], output_names=['logits'])
                assert exported is not None
                exported.save(file)
    merged.float()
    return _quantised(file, batch) if int8 else {name: file}


def _quantised(file: Path, batch: Tensor) -> dict[str, Path]:
    """An ONNX file in int8, channel by channel, whole and with the depthwise convolutions in float."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(CalibrationDataReader):
        """The images, one by one."""

        def __init__(self) -> None:
            self.images = iter(batch.split(1))

        def get_next(self) -> dict[str, Any] | None:
            """The next image."""
            image = next(self.images, None)
            return None if image is None else {'image': image.numpy()}

    prepared = file.with_suffix('.prepared.onnx')
    with _quiet():
        quant_pre_process(file, prepared, skip_symbolic_shape=True)  # which fails on GRN; the exporter wrote the shapes
        depthwise = [
            node.name for node in onnx.load(prepared).graph.node
            if node.op_type == 'Conv' and any(a.name == 'group' and a.i > 1 for a in node.attribute)]
        files: dict[str, Path] = {}
        for name, excluded in ((INT8_ALL, []), (INT8_BUT_DEPTHWISE, depthwise)):
            files[name] = file.with_name(f'{len(files)}.onnx')
            quantize_static(
                prepared, files[name], Calibration(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, nodes_to_exclude=excluded)
    return files


def open_file(file: Path, to: str) -> Callable[[Tensor], Tensor]:
    """Run a file that was exported: images [B, 3, H, W] in, logits out, in float32."""
    if to == 'onnx':
        from onnxruntime import InferenceSession, SessionOptions
        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        (put,) = session.get_inputs()
        dtype = torch.float16 if put.type == 'tensor(float16)' else torch.float32
        return lambda x: torch.from_numpy(session.run(None, {put.name: x.to(dtype).numpy()})[0]).float()
    module = torch.jit.load(str(file)) if to == 'torchscript' else torch.export.load(file).module()
    return lambda x: module(x).float()


def _compared(name: str, file: Path, to: str, merged: ShiftwiseNet, batch: Tensor, wanted: Tensor) -> Form:
    run = open_file(file, to)
    images = batch.half() if name == 'float16' else batch
    with torch.inference_mode():
        logits = torch.cat([run(image) for image in images.split(1)])
        times = time_calls([partial(run, images[:1]), partial(merged, batch[:1])], batch.device, _REPEATS)
    ours, theirs = (statistics.median(taken) for taken in times)
    error = float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    agreement = float((logits.argmax(1) == wanted.argmax(1)).float().mean())
    return Form(name, error, agreement, ours, ours / theirs, file.stat().st_size / 1e6)


def _choose(forms: dict[str, Form]) -> Form:
    if INT8_ALL not in forms:
        return next(iter(forms.values()))
    whole, mixed = forms[INT8_ALL], forms[INT8_BUT_DEPTHWISE]
    return mixed if mixed.error < whole.error or mixed.milliseconds < whole.milliseconds else whole


def _refuse_disagreement(form: Form, seen: str, least_agreement: float) -> None:
    if form.name == 'float32' and not form.error <= _TOLERANCE:
        raise HubError(
            f'The file does not give the logits of PyTorch on {seen}: they differ by {form.error:.1e} of the largest, '
            f'at most {_TOLERANCE:.0e} is allowed. Nothing was written.')
    if form.name != 'float32' and not form.agreement >= least_agreement:
        raise HubError(
            f'The file in {form.name} names the class that PyTorch does for {form.agreement:.1%} of {seen}, at least '
            f'{least_agreement:.1%} is asked for. Nothing was written.')


def _described(
        network: ShiftwiseNet, output: Path, to: str, dynamic: bool, kept: Form, forms: list[Form],
        labels: Sequence[str] | None, seen: str, batch: Tensor) -> dict[str, Any]:
    """What whoever runs the file has to know."""
    if labels is None and network.num_classes == 1000:
        labels = cast('list[str]', ImageNetInfo('imagenet-1k').label_descriptions())
    config = resolve_model_data_config(network)
    packages = ['torch', 'timm', 'timm-shiftwise', *(['onnx', 'onnxruntime'] if to == 'onnx' else [])]
    return {
        'file': output.name, 'format': to,
        'input': {
            'name': 'image', 'shape': ['B', *batch.shape[1:2], *('HW' if dynamic else batch.shape[2:])],
            'dtype': 'float16' if kept.name == 'float16' else 'float32', 'channels': 'RGB',
            'values': '0 to 1, then (x - mean) / std',
            **{name: config[name] for name in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        },
        'output': {'name': 'logits', 'shape': ['B', network.num_classes]},
        'labels': None if labels is None else list(labels),
        'compared': {'images': len(batch), 'seen': seen, 'kept': kept.name, 'forms': [asdict(form) for form in forms]},
        'versions': {package: version(package) for package in packages},
    }


def _needed(*packages: str) -> None:
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise HubError(
                f"Exporting to ONNX needs {package}: pip install onnx onnxruntime onnxscript, or, in a clone of "
                f"timm-shiftwise, pip install '.[export]' ({error}).") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and log lines, which are for their developers."""
    import logging

    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        root.setLevel(level)
