"""Whether everything runs, is right and is fast on a device: what someone who has one sends to someone who has not."""
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

import timm_shiftwise
from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.ops.backend import explain_backend
from timm_shiftwise.ops.measured import CHOICES, is_timed
from timm_shiftwise.ops.shiftwise_conv.call import Branches, Call
from timm_shiftwise.ops.shiftwise_conv.shift import reference_conv2d
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS, Way, choose_way

from .estimate import BASELINE
from .kept import check_network, stage_blocks
from .network import image_size, profile_model
from .operators import block_operator
from .timing import time_calls
from .ways import call_of

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error of an operator, as a share of the largest value, by dtype."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        section: What it belongs to.
        what: What was looked at.
        good: Whether all is well; None where there is nothing to judge.
        said: What was seen.
    """
    section: str
    what: str
    good: bool | None
    said: str


class Geometry(NamedTuple):
    """A call of the operator that is compared with its definition, 2 shuffles, about half of the groups pruned."""
    padding: str
    batch: int
    channels: int
    height: int
    width: int
    focus_length: int
    kernel_size: int


GEOMETRIES = (
    Geometry('full', 2, 5, 9, 7, 13, 3), Geometry('same', 2, 3, 7, 12, 11, 5), Geometry('full', 3, 2, 1, 1, 7, 5),
    Geometry('full', 1, 3, 31, 17, 15, 5), Geometry('full', 2, 8, 56, 60, 51, 5), Geometry('same', 1, 4, 28, 28, 49, 3),
)


@dataclass(frozen=True)
class Setting:
    """What is checked, and how much of it.

    Attributes:
        device: The device.
        model: Name of the network that is run.
        batch_size: Images in a batch when it is timed.
        quick: Whether to leave out the larger geometries, the code that inductor generates, and all but a few runs.
    """
    device: torch.device
    model: str
    batch_size: int
    quick: bool


def check_device(setting: Setting) -> Iterator[Finding]:
    """Go through everything and yield what is found; what goes wrong is a finding, too, and no exception."""
    for section in (_machine, _ways, _networks, _speed, _chosen):
        yield from section(setting)


def _found(section: str, what: str, look: Callable[[], tuple[bool | None, str]]) -> Finding:
    try:
        return Finding(section, what, *look())
    except Exception as error:  # noqa: BLE001  (whatever is raised is what was found)
        told = ' '.join(str(error).split())
        return Finding(section, what, False, f'{type(error).__name__}: {told[:300]}')


def _machine(setting: Setting) -> Iterator[Finding]:
    def packages() -> str:
        return ', '.join(f'{name} {_version(name)}' for name in ('torch', 'timm', 'triton', 'taichi'))

    def device() -> str:
        if setting.device.type != 'cuda':
            vectors = torch.backends.cpu.get_cpu_capability()
            return f'{setting.device.type}, threads: {torch.get_num_threads()}, processor with {vectors}'
        seen = torch.cuda.get_device_properties(setting.device)
        runtime = f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'
        return (
            f'{seen.name}, compute capability {seen.major}.{seen.minor}, {seen.total_memory / 2 ** 30:.0f} GiB, '
            f'{seen.multi_processor_count} multiprocessors, {runtime}, cuDNN {torch.backends.cudnn.version()}')

    def system() -> str:
        return f'timm_shiftwise {timm_shiftwise.__version__}, Python {platform.python_version()}, {platform.platform()}'

    for tell in (system, packages, device):
        yield _found('machine', tell.__name__, partial(_told, tell))


def _told(tell: Callable[[], str]) -> tuple[None, str]:
    return None, tell()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'none'


def _ways(setting: Setting) -> Iterator[Finding]:
    """Every way against the definition in float64 on the CPU."""
    geometries = GEOMETRIES[:3] if setting.quick else GEOMETRIES
    wanted = {geometry: _reference(geometry) for geometry in geometries}
    dtypes = [dtype for dtype in TOLERANCES if setting.device.type != 'mps' or dtype != torch.float64]
    for way in WAYS.values():
        for dtype in dtypes:
            yield _found(
                'ways', f'{way.name}, {str(dtype).removeprefix("torch.")}',
                partial(_compare, way, dtype, setting.device, wanted))


class Reference(NamedTuple):
    """A call in float64 on the CPU, what it must give, and what its gradients must be for those of the branches."""
    call: Call
    mask: Tensor
    grads: Branches
    results: tuple[Tensor, ...]


def _reference(geometry: Geometry) -> Reference:
    padding, batch, channels, height, width, focus_length, size = geometry
    generator = torch.Generator().manual_seed(0)
    groups = num_groups(focus_length, size)

    def noise(*shape: int) -> Tensor:  # that every dtype holds
        return torch.randn(shape, generator=generator).bfloat16().double()

    mask = torch.rand(channels, groups, generator=generator) < .5
    x, weight = noise(batch, channels, height, width), noise(channels, groups, size, size) * mask[..., None, None]
    wiring = torch.randint(groups, (2, channels, 2 * groups + 1), generator=generator, dtype=torch.int32)
    inputs = x.requires_grad_(), weight.requires_grad_()
    branches = reference_conv2d(x, weight, wiring, focus_length, padding)
    grads = noise(*x.shape), noise(*x.shape), noise(*x.shape)
    grad_x, grad_weight = torch.autograd.grad(branches, inputs, grads)
    call = Call(x.detach(), weight.detach(), wiring, mask, focus_length, padding)
    results = *(branch.detach() for branch in branches), grad_x, _of_kept(grad_weight, mask)
    return Reference(call, mask, grads, results)


def _of_kept(grad_weight: Tensor, mask: Tensor) -> Tensor:
    """Without the gradients of pruned groups, which the operator's user does not take."""
    return grad_weight * mask[..., None, None]


def _compare(
        way: Way, dtype: torch.dtype, device: torch.device,
        references: dict[Geometry, Reference]) -> tuple[bool | None, str]:
    """Largest error of a way, in all it computes, over the geometries that nothing hinders it in."""
    if way.backends == ('taichi',):
        choice = explain_backend('auto', device)
        if choice.backend != 'taichi':
            return None, f'does not run here: {choice.reason}'
    errors: dict[Geometry, float] = {}
    for geometry, (reference, mask, reference_grads, results) in references.items():
        x, weight, *grads = (
            tensor.to(device, dtype) for tensor in (reference.x, reference.weight, *reference_grads))
        mask = mask.to(device)
        call = reference._replace(x=x, weight=weight, wiring=reference.wiring.to(device), mask=mask)
        obstacle = way.obstacle(call)
        if obstacle is None:
            grad_x, grad_weight = way.backward((grads[0], grads[1], grads[2]), call, True, True)
            assert grad_x is not None and grad_weight is not None
            errors[geometry] = max(
                float((seen.cpu().double() - result).abs().max() / result.abs().max().clamp(min=1e-30))
                for seen, result in zip(
                    (*way.forward(call), grad_x, _of_kept(grad_weight, mask)), results, strict=True))
    if not errors:
        return None, f'does not run here: {obstacle}'
    worst = max(errors, key=errors.__getitem__)
    said = f'error {errors[worst]:.1e} of at most {TOLERANCES[dtype]:.0e} in {len(errors)} geometries, most in {worst}'
    return all(error <= TOLERANCES[dtype] for error in errors.values()), said  # which NaN is not


def _network(name: str, device: torch.device) -> nn.Module:
    """A network whose blocks matter, though it was never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith('gamma'):
                parameter.fill_(.5)
    return model.to(device)


def _images(setting: Setting, batch_size: int) -> Tensor:
    size = image_size(check_network(timm.create_model(setting.model, device='meta')), None)
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(setting.device)


def _step(model: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Forward and backward of a batch; gives the loss."""
    target = torch.arange(len(x), device=x.device) % 10
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def _networks(setting: Setting) -> Iterator[Finding]:
    """Training under autocast, compiled and merged networks, beside the network as it is."""
    device = setting.device

    def model_and_images() -> tuple[nn.Module, Tensor]:
        model = _network(setting.model, device)
        return model, _images(setting, 2)

    def trains(dtype: torch.dtype) -> tuple[bool, str]:
        model, x = model_and_images()
        loss = float(_step(model, x, dtype))
        without = [
            key for key, parameter in model.named_parameters()
            if parameter.grad is None or not bool(parameter.grad.isfinite().all())]
        return not without and loss == loss, f'loss {loss:.3f}, without a finite gradient: {without or "none"}'

    @torch.no_grad()
    def near(other: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> tuple[bool, str]:
        model, x = model_and_images()
        wanted = model.eval()(x)
        error = float((other(model)(x) - wanted).abs().max() / wanted.abs().max())
        return error < 1e-2, f'logits differ by {error:.1e} of the largest'

    def compiled_trains() -> tuple[bool, str]:
        model, x = model_and_images()
        wanted = float(_step(model, x, torch.float32))
        loss = float(_step(torch.compile(model, backend=backend), x, torch.float32))
        return abs(loss - wanted) < 1e-2 * abs(wanted), f'loss {loss:.4f}, not compiled {wanted:.4f}'

    backend = 'aot_eager' if setting.quick else 'inductor'
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = 'float32' if dtype == torch.float32 else f'autocast to {str(dtype).removeprefix("torch.")}'
        yield _found('networks', f'training step, {name}', partial(trains, dtype))
    yield _found('networks', f'compiled by {backend}', partial(near, partial(torch.compile, backend=backend)))
    yield _found('networks', f'training step, compiled by {backend}', compiled_trains)
    yield _found('networks', 'merged', partial(near, lambda model: reparameterize_model(model)))


@contextmanager
def _benchmark() -> Iterator[None]:
    """As timm's scripts have it, which is what has choices measured."""
    was = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = was


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == 'cpu' else torch.bfloat16


def _speed(setting: Setting) -> Iterator[Finding]:
    """The network beside the one that it is compared with, in turns."""
    device, dtype = setting.device, _dtype(setting.device)
    names = setting.model, BASELINE

    def timed(calls: list[Callable[[], Any]]) -> tuple[None, str]:
        with _benchmark():
            times = time_calls(calls, device, 3 if setting.quick else 20)
            peaks = [_peak(call, device) for call in calls]
        ours, baseline = map(statistics.median, times)
        told = [f'{name} {ms:.2f} ms{peak}' for name, ms, peak in zip(names, (ours, baseline), peaks, strict=True)]
        return None, f'{"; ".join(told)}; {ours / baseline:.2f} times as long'

    def steps() -> tuple[None, str]:
        models = [_network(name, device).train() for name in names]
        x = _images(setting, setting.batch_size)
        return timed([partial(_step, model, x, dtype) for model in models])

    @torch.inference_mode()
    def inference() -> tuple[None, str]:
        models = [reparameterize_model(_network(name, device).eval()) for name in names]
        x = _images(setting, setting.batch_size)

        def run(model: nn.Module) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return model(x)
        return timed([partial(run, model) for model in models])

    where = f'batch {setting.batch_size}, {str(dtype).removeprefix("torch.")}'
    yield _found('speed', f'training step without optimiser, {where}', steps)
    yield _found('speed', f'merged forward, {where}', inference)


def _peak(call: Callable[[], Any], device: torch.device) -> str:
    """The most memory that a call allocates, what was there before it included, for people; empty where unknown."""
    if device.type != 'cuda':
        return ''
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return f' (peak {torch.cuda.max_memory_allocated(device) / 2 ** 20:,.0f} MiB)'


def _chosen(setting: Setting) -> Iterator[Finding]:
    """The way that each stage takes at the size that was timed, and what was measured for it."""
    device = setting.device

    def way_of(operator: ShiftwiseConv2d, height: int, width: int, backward: bool) -> tuple[None, str]:
        x = torch.zeros(
            setting.batch_size, operator.num_worked, height, width, device=device, dtype=_dtype(device))
        with _benchmark():
            choice = choose_way(call_of(operator, x), backward)
        return None, f'{choice.way.name}: {choice.reason}'

    model = check_network(timm.create_model(setting.model))
    for blocks, stage in zip(stage_blocks(model), profile_model(model).stages, strict=True):
        operator = block_operator(blocks[0])
        if isinstance(operator, ShiftwiseConv2d):
            for backward in (False, True):
                yield _found(
                    'choices', f'stage {stage.stage}, {"backward" if backward else "forward"}',
                    partial(way_of, operator, stage.height, stage.width, backward))
    if is_timed(device):
        for record in CHOICES.records():
            yield Finding('measured', 'choice', None, ', '.join(f'{key} {value}' for key, value in record.items()))
