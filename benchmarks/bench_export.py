"""Networks as they are handed on: merged, compiled, in ONNX Runtime, and there in int8.

    python benchmarks/bench_export.py

Files, latency of one image, and how far the logits are from those of the network as it trains. Every form is compared
with that before it is timed. ONNX Runtime gets the threads that PyTorch has; int8 is its static quantisation. The model
with packaged weights, test_sw.digits, also reads the quickstart's held-out digits; the others have random weights, of
which int8 keeps less than of trained ones. ``--training`` adds the training step, eager and compiled.
"""
import copy
import logging
from collections.abc import Callable, Iterator
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
    report_targets,
    save,
    show,
    start,
    write_csv,
)
from bench_networks import Training, infer
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import save_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

import timm_shiftwise  # noqa: F401  (registers the networks)
from timm_shiftwise.quickstart.digits import write_digits
from timm_shiftwise.quickstart.training import held_out_loader, image_size, score, train_loader

DIGITS = 'test_sw.digits'
TRAINED, MERGED, COMPILED, ONNX, INT8 = FORMS = 'eager', 'eager, merged', 'compiled, merged', 'ONNX', 'ONNX, int8'
STEP, STEP_COMPILED = 'training step, eager', 'training step, compiled'
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
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith('gamma'):
                parameter.fill_(.5)
        model.train()(x)
    return model.eval()


def exported(model: nn.Module, x: Tensor, file: Path) -> Path:
    """The network in ONNX for batches of any size."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    return file


def quantized(file: Path, batches: Iterator[Tensor], threads: int) -> Path:
    """The ONNX file in int8, quantised channel by channel, as far as ONNX Runtime does."""
    prepared, result = file.with_suffix('.prepared.onnx'), file.with_suffix('.int8.onnx')
    quant_pre_process(file, prepared)
    quantize_static(
        prepared, result, Calibration(Session(file, threads).input.name, batches), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    return result


def inference(name: str, args: Any, device: torch.device, folder: Path) -> list[dict]:
    """Build, check and time every form of a network."""
    side = image_size(timm.create_model(name))
    images = torch.randn(CALIBRATION_BATCHES, 4, 3, side, side, generator=torch.Generator().manual_seed(0))
    calibration, held_out = images[:, :1], None  # the quantiser keeps every value between: 5 GB for an image of p2_sw
    model = create(name, images[0])
    if name == DIGITS:
        write_digits(folder / 'digits')
        held_out = held_out_loader(folder / 'digits', model, device)
        loader = train_loader(folder / 'digits', model, device)
        calibration = [batch for (batch, _), _ in zip(loader, range(CALIBRATION_BATCHES), strict=False)]
        images = torch.stack([batch for batch, _ in held_out][:1])
    fused = reparameterize_model(copy.deepcopy(model))
    torch._dynamo.reset()
    file = exported(fused, images[0], folder / f'{name}.onnx')
    int8 = quantized(file, iter(calibration), args.threads)
    forms = {
        TRAINED: model,
        MERGED: fused,
        COMPILED: torch.compile(fused),
        ONNX: Session(file, args.threads),
        INT8: Session(int8, args.threads),
    }
    files = {TRAINED: folder / 'trained.safetensors', MERGED: folder / 'merged.safetensors', ONNX: file, INT8: int8}
    for form in (TRAINED, MERGED):
        save_model(forms[form], str(files[form]))
    x = images[0, :args.batch].contiguous()
    wanted = infer(model, x)
    rows = []
    for form, network in forms.items():
        seen = infer(network, x)
        check_close([seen], [wanted], f'{name}, {form}', INT8_TOLERANCE if form == INT8 else 1e-4)
        rows.append({
            'model': name, 'form': form, 'size': side, 'batch': len(x),
            'file_mb': round(files[form].stat().st_size / 1e6, 2) if form in files else '',
            'difference': float(f'{(seen - wanted).abs().max():.2g}'),
            'largest_logit': float(f'{wanted.abs().max():.3g}'),
            'top1': round(score(network, held_out, device).accuracy, 2) if held_out and form != COMPILED else '',
        })
    calls: dict[str, Callable[[], Tensor]] = {form: partial(infer, network, x) for form, network in forms.items()}
    return timed(rows, calls, args, device)


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
    return timed(rows, {form: each.step for form, each in trainings.items()}, args, device)


def timed(rows: list[dict], calls: dict[str, Callable[[], Tensor]], args: Any, device: torch.device) -> list[dict]:
    """The rows, with how long each form took."""
    timings = measure(calls, device, args.seconds, args.least)
    console.print(f'{rows[0]["model"]}, {", ".join(calls)}: done')
    return [{
        **row, 'median_ms': round(timings[row['form']].median, 3), 'best_ms': round(timings[row['form']].best, 3),
        'runs': len(timings[row['form']].samples),
    } for row in rows]


def targets(rows: list[dict]) -> list[Target]:
    """The ratios that are wanted or told."""
    at = {(row['model'], row['form']): row['median_ms'] for row in rows}
    pairs = (
        ('compiled over eager, merged', COMPILED, MERGED, 1.),
        ('compiled over eager, training step', STEP_COMPILED, STEP, 1.),
        ('ONNX Runtime over eager, merged', ONNX, MERGED, None),
        ('int8 over float32 in ONNX Runtime', INT8, ONNX, None),
        ('merged over as it trains, eager', MERGED, TRAINED, None),
    )
    return [
        Target(what, model, at[model, first] / at[model, second], *(('at most', limit) if limit else ()))
        for what, first, second, limit in pairs for model in dict.fromkeys(row['model'] for row in rows)
        if (model, first) in at]


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
    figure, axes = new_figure(len(models), f'One network in every form, {args.batch} image at a time: median ms')
    for axis, model in zip(axes[0], models, strict=True):
        found = [row for row in rows if row['model'] == model and row['form'] in FORMS]
        axis.bar(range(len(found)), [row['median_ms'] for row in found], color=COLOURS[:len(found)])
        axis.set_xticks(range(len(found)), [row['form'] for row in found], rotation=60, ha='right')
        axis.set_title(model, fontsize=9)
    settings = {'dtype': 'float32, int8 where the form says so', 'seconds': args.seconds, 'allocator': args.allocator}
    written = (
        report_targets(targets(rows), args.output, device, **settings),
        write_csv(args.output, rows, device, **settings),
        save(figure, args.output),
    )
    console.print('wrote ' + ', '.join(map(str, written)))


def main() -> None:
    """Build, check, time, and write the results."""
    options = parser(__doc__.splitlines()[0], 'export')
    options.add_argument(
        '--models', nargs='+', default=['sw_tiny', 'p2_sw_tiny', 'convnext_tiny', DIGITS], help='networks to measure')
    options.add_argument('--training', action='store_true', help='also the training step of sw_tiny, batch 4')
    options.set_defaults(device='cpu', batch=1)
    args = options.parse_args()
    device = start(args)
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser warns of every norm that has no channels to go by
    rows = []
    for name in args.models:
        with TemporaryDirectory() as folder:
            rows += inference(name, args, device, Path(folder))
    if args.training:
        rows += training('sw_tiny', args, device)
    report(rows, args, device)


if __name__ == '__main__':
    main()
