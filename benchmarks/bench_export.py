"""Networks as they are handed on: merged, compiled, in ONNX Runtime, and there in int8.

    python benchmarks/bench_export.py

Files, latency of one image, and how far the logits are from those of the network as it trains. Every form is compared
with that before it is timed. The ONNX files are made of the merged network by ``torch.export`` and PyTorch's exporter
(``torch.onnx.export(..., dynamo=True)``), for batches of any size and images of one size; ONNX Runtime gets the threads
that PyTorch has; int8 is its static quantisation. ONNX Runtime is timed with several images (``--batch``), too, and
sw_tiny there once more without what its export does for it: the maps that its wide kernels read are padded beforehand.
All networks take turns, so that one may be compared with another.

The model with packaged weights, test_sw.digits, also reads the quickstart's held-out digits; the others have random
weights, of which int8 keeps less than of trained ones. ``--training`` adds the training step, eager and compiled.
"""
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from _common import (
    COLOURS,
    Target,
    check_close,
    console,
    measure,
    new_figure,
    parser,
    show,
    start,
    write_results,
)
from bench_networks import Training, infer, let_blocks_matter
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import save_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

import timm_shiftwise  # noqa: F401  (registers the networks)
from timm_shiftwise.layers import MergedConv2d
from timm_shiftwise.quickstart.digits import write_digits
from timm_shiftwise.quickstart.training import held_out_loader, image_size, score, train_loader

DIGITS, SW, SW_V2, CONVNEXT = 'test_sw.digits', 'sw_tiny', 'sw_v2_tiny', 'convnext_tiny'
TRAINED, MERGED, COMPILED, ONNX, INT8 = FORMS = 'eager', 'eager, merged', 'compiled, merged', 'ONNX', 'ONNX, int8'
UNPADDED = 'ONNX, no map padded'
STEP, STEP_COMPILED = 'training step, eager', 'training step, compiled'
ONNX_OVER_CONVNEXT = 1.3
ONNX_OVER_EAGER = {SW: .6}
INT8_TOLERANCE = .5
CALIBRATION_BATCHES = 8


class Session(nn.Module):
    """A network in ONNX Runtime.

    Args:
        file: The network, with one input and one output.
        threads: Threads of an operator.
    """

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        options = SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = InferenceSession(file, options, providers=['CPUExecutionProvider'])
        (self.input,) = self.session.get_inputs()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return torch.from_numpy(self.session.run(None, {self.input.name: x.numpy()})[0])


class Calibration(CalibrationDataReader):
    """Images for ONNX Runtime to see how large the network's values get.

    Args:
        name: Of the network's input.
        batches: Images.
    """

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self.name, self.batches = name, batches

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def create(name: str, x: Tensor) -> nn.Module:
    """A network whose layer scales let its blocks matter and whose BatchNorms have seen images; or the packaged one."""
    if name == DIGITS:
        return timm.create_model(name, pretrained=True).eval()
    model = timm.create_model(name)
    let_blocks_matter(model)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def unpadded(model: nn.Module) -> nn.Module:
    """A merged network that pads no map when it is exported."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MergedConv2d):
            module.large_map = False
    return model


def exported(model: nn.Module, x: Tensor, file: Path) -> Path:
    """The network in ONNX for batches of any size."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    return file


def quantized(file: Path, batches: Iterator[Tensor], threads: int) -> Path:
    """The ONNX file in int8, quantised channel by channel, as far as ONNX Runtime does."""
    prepared, result = file.with_suffix('.prepared.onnx'), file.with_suffix('.int8.onnx')
    quant_pre_process(file, prepared, skip_symbolic_shape=True)  # which fails on GRN; the exporter wrote the shapes
    quantize_static(
        prepared, result, Calibration(Session(file, threads).input.name, batches), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    return result


@dataclass
class Network:
    """A network in every form, built and not yet timed.

    Attributes:
        name: Of the model.
        images: Some images, [batches, batch, channels, side, side].
        forms: The networks to time, by form.
        files: The files of those that have one.
        held_out: Images with labels, where the weights can read them.
    """
    name: str
    images: Tensor
    forms: dict[str, nn.Module]
    files: dict[str, Path]
    held_out: Any = None

    def rows(self, batch: int, device: torch.device) -> list[dict]:
        """Check the forms with so many images; a row for each that is timed so.

        Raises:
            AssertionError: If one gives other logits.
        """
        x = self.x(batch)
        wanted = infer(self.forms[TRAINED], x)
        rows = []
        for form, network in self.timed_at(batch).items():
            seen = infer(network, x)
            check_close([seen], [wanted], f'{self.name}, {form}', INT8_TOLERANCE if INT8 in form else 1e-4)
            reads = self.held_out and form in FORMS and form != COMPILED
            rows.append({
                'model': self.name, 'form': form, 'size': x.shape[-1], 'batch': len(x),
                'file_mb': round(self.files[form].stat().st_size / 1e6, 2) if form in self.files else '',
                'difference': float(f'{(seen - wanted).abs().max():.2g}'),
                'largest_logit': float(f'{wanted.abs().max():.3g}'),
                'top1': round(score(network, self.held_out, device).accuracy, 2) if reads else '',
            })
        return rows

    def x(self, batch: int) -> Tensor:
        """So many images."""
        return self.images[0, :batch].contiguous()

    def timed_at(self, batch: int) -> dict[str, nn.Module]:
        """The networks to time with so many images: all with one, else those in ONNX Runtime; the batch is named."""
        if batch == 1:
            return self.forms
        return {at_batch(form, batch): self.forms[form] for form in (ONNX, UNPADDED) if form in self.forms}


def batches(args: Any) -> list[int]:
    """The numbers of images that are timed."""
    return sorted({1, args.batch})


def at_batch(form: str, batch: int) -> str:
    """The name of a form that is timed with so many images."""
    return form if batch == 1 else f'{form}, batch {batch}'


def build(name: str, args: Any, device: torch.device, folder: Path) -> Network:
    """Every form of a network, not yet checked."""
    side = image_size(timm.create_model(name))
    count = max(args.batch, 2)  # a network that is exported with one image takes no more
    images = torch.randn(CALIBRATION_BATCHES, count, 3, side, side, generator=torch.Generator().manual_seed(0))
    calibration, held_out = images[:, :1], None  # the quantiser keeps every value between: 5 GB for an image of p2_sw
    model = create(name, images[0])
    if name == DIGITS:
        write_digits(folder / 'digits')
        held_out = held_out_loader(folder / 'digits', model, device)
        loader = train_loader(folder / 'digits', model, device)
        calibration = [batch for (batch, _), _ in zip(loader, range(CALIBRATION_BATCHES), strict=False)]
        images = torch.stack([batch for batch, _ in held_out][:1])
    merged = reparameterize_model(copy.deepcopy(model))
    forms = {TRAINED: model, MERGED: merged}
    # static, or networks that share code and differ in their images' sizes would make one another's sizes dynamic
    forms[COMPILED] = torch.compile(merged, dynamic=False)
    files = {form: folder / f'{name}.{form}.safetensors' for form in (TRAINED, MERGED)}
    for form, file in files.items():
        save_model(forms[form], str(file))
    files[ONNX] = exported(merged, images[0], folder / f'{name}.onnx')
    files[INT8] = quantized(files[ONNX], iter(calibration), args.threads)
    if name == SW:
        files[UNPADDED] = exported(unpadded(merged), images[0], folder / f'{name}.unpadded.onnx')
    forms.update({form: Session(files[form], args.threads) for form in (ONNX, INT8, UNPADDED) if form in files})
    console.print(f'{name}: built')
    return Network(name, images, forms, files, held_out)


def inference(args: Any, device: torch.device, folder: Path) -> list[dict]:
    """Build, check and time every form of all networks."""
    networks = [build(name, args, device, folder) for name in args.models]
    torch._dynamo.reset()  # what the exports left behind
    rows = []
    for batch in batches(args):
        found = [row for network in networks for row in network.rows(batch, device)]
        calls = {
            (network.name, form): partial(infer, model, network.x(batch))
            for network in networks for form, model in network.timed_at(batch).items()}
        rows += timed(found, calls, args, device)
        console.print(f'batch {batch}: done')
    return rows


def training(name: str, args: Any, device: torch.device) -> list[dict]:
    """Check and time a training step, eager and compiled."""
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    model = create(name, x)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    trainings = {STEP: Training(model, x), STEP_COMPILED: Training(twin, x)}
    trainings[STEP_COMPILED].model = torch.compile(twin)
    losses = [each.step().detach() for each in trainings.values()]
    check_close(losses[1:], losses[:1], f'{name}, compiled training')
    rows = [{
        'model': name, 'form': form, 'size': 224, 'batch': len(x), 'file_mb': '',
        'difference': float(f'{(loss - losses[0]).abs():.2g}'), 'largest_logit': '', 'top1': '',
    } for form, loss in zip(trainings, losses, strict=True)]
    return timed(rows, {(name, form): each.step for form, each in trainings.items()}, args, device)


def timed(
        rows: list[dict],
        calls: dict[tuple[str, str], Callable[[], Tensor]],
        args: Any,
        device: torch.device,
) -> list[dict]:
    """The rows, with how long each form of each network took."""
    timings = measure(calls, device, args.seconds, args.least)
    return [{**row, **timings[row['model'], row['form']].columns()} for row in rows]


def targets(rows: list[dict], args: Any) -> list[Target]:
    """The ratios that are wanted or told."""
    at = {(row['model'], row['form']): row['median_ms'] for row in rows}
    models = dict.fromkeys(row['model'] for row in rows)
    compiled = dict.fromkeys(models, 1.)
    pairs: tuple[tuple[str, str, str, dict[str, float]], ...] = (
        ('compiled over eager, merged', COMPILED, MERGED, compiled),
        ('compiled over eager, training step', STEP_COMPILED, STEP, compiled),
        ('ONNX Runtime over eager, merged', ONNX, MERGED, ONNX_OVER_EAGER),
        ('int8 over float32 in ONNX Runtime', INT8, ONNX, {}),
        ('merged over as it trains, eager', MERGED, TRAINED, {}),
    )
    found = [
        ratio(what, model, at[model, first], at[model, second], limits.get(model))
        for what, first, second, limits in pairs for model in models if (model, first) in at]
    for batch in batches(args):
        where, form, unpadded_form = f'batch {batch}', at_batch(ONNX, batch), at_batch(UNPADDED, batch)
        found += [
            ratio(f'ONNX Runtime, merged {model} over {CONVNEXT}', where, at[model, form], at[CONVNEXT, form], limit)
            for model, limit in ((SW, ONNX_OVER_CONVNEXT), (SW_V2, None))
            if {(model, form), (CONVNEXT, form)} <= at.keys()]
        if (SW, unpadded_form) in at:
            found.append(ratio(
                f'ONNX Runtime, {SW}: wide kernels on padded maps over none', where, at[SW, form],
                at[SW, unpadded_form]))
    return found


def ratio(what: str, where: str, first: float, second: float, limit: float | None = None) -> Target:
    """A ratio, with what it must be at most."""
    return Target(what, where, first / second, *(() if limit is None else ('at most', limit)))


def report(rows: list[dict], args: Any, device: torch.device) -> None:
    """Tables, CSV and plot."""
    models = list(dict.fromkeys(row['model'] for row in rows))
    lines: list[list[str]] = []
    for model in models:
        lines += [[], *([
            f'{model}, {row["form"]}', str(row['file_mb']), f'{row["median_ms"]:.1f}',
            f'{row["difference"]:.1e}', str(row['largest_logit']), str(row['top1']),
        ] for row in rows if row['model'] == model)]
    show('forms of a network', [
        'model', 'file, MB', 'median ms', 'largest difference', 'largest logit', 'top-1, %'], lines[1:])
    figure, axes = new_figure(len(models), 'One network in every form, one image at a time: median ms')
    for axis, model in zip(axes[0], models, strict=True):
        found = [row for row in rows if row['model'] == model and row['form'] in FORMS]
        axis.bar(range(len(found)), [row['median_ms'] for row in found], color=COLOURS[:len(found)])
        axis.set_xticks(range(len(found)), [row['form'] for row in found], rotation=60, ha='right')
        axis.set_title(model, fontsize=9)
    write_results(
        args, device, rows, figure, targets(rows, args), dtype='float32, int8 where the form says so',
        exporter='torch.export and torch.onnx.export(dynamo=True)')


def main() -> None:
    """Build, check, time, and write the results."""
    options = parser(__doc__.splitlines()[0], 'export')
    options.add_argument(
        '--models', nargs='+', default=[SW, SW_V2, 'p2_sw_tiny', CONVNEXT, DIGITS], help='networks to measure')
    options.add_argument('--training', action='store_true', help='also the training step of sw_tiny, batch 4')
    options.set_defaults(device='cpu')
    args = options.parse_args()
    device = start(args)
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser warns of every norm that has no channels to go by
    with TemporaryDirectory() as folder:
        rows = inference(args, device, Path(folder))
    if args.training:
        rows += training(SW, args, device)
    report(rows, args, device)


if __name__ == '__main__':
    main()
