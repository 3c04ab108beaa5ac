"""One call, drawn from a seed and a number: its arguments, how they lie in memory, and what must come of it."""
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.geometry import map_size, num_groups
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.ops import shift_add, shiftwise_conv2d
from timm_shiftwise.ops.shift_add import shift_add_torch
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.shift import reference_conv2d
from timm_shiftwise.ops.shiftwise_conv.ways import ENVIRONMENT_VARIABLE, WAYS
from timm_shiftwise.ops.taichi.runtime import LANES, PACKS

from .memory import GUARDS, place

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST_SIZE, LARGEST_WIDTH = 9, 40
CALLS_IN_A_SETTING = 1000
REFUSALS = (ValueError, TypeError, RuntimeError)
# roundings that a result may be off by, in units of what the same sum of absolute values rounds by
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 16, torch.bfloat16: 16}

RIGHT, REFUSED = 'right', 'refused'

raw = torch.ops.timm_shiftwise


class Setting(NamedTuple):
    """What Taichi compiles a kernel for, which takes seconds: the same for many calls.

    Attributes:
        kernel_size: N.
        padding: Padding policy.
        dtype: Of maps and kernels.
        threads: Threads of PyTorch's.
        widths: Of the image; those that a kernel is compiled alike for.
    """
    kernel_size: int
    padding: str
    dtype: torch.dtype
    threads: int
    widths: list[int]


def draw_setting(seed: int, number: int) -> Setting:
    """The setting of so many calls; in ten of them, one after the other, images are of every width modulo 16."""
    rng = random.Random(f'setting {number} of {seed}')
    size = rng.randint(1, LARGEST_SIZE)

    def kind(width: int) -> tuple[int, ...]:
        pack = next((pack for pack in PACKS if width % pack == 0), 1)
        return pack, -(-width // LANES), -(-(width + size - 1) // LANES)

    first = 1 + 7 * number % LARGEST_WIDTH
    widths = [width for width in range(1, LARGEST_WIDTH + 1) if kind(width) == kind(first)]
    return Setting(size, rng.choice(('full', 'same')), rng.choice(DTYPES), rng.choice((1, 2)), widths)


def make_call(seed: int, number: int) -> str:
    """Make a call.

    Returns:
        ``'right'``, ``'refused'`` for an invalid call that was, or what is wrong.
    """
    rng = random.Random(f'call {number} of {seed}')
    setting = draw_setting(seed, number // CALLS_IN_A_SETTING)
    torch.set_num_threads(setting.threads)
    drawn = Drawn(rng, setting)
    fault = rng.choice(drawn.faults()) if rng.random() < 0.3 else None
    if fault is not None:
        FAULTS[fault](drawn.arguments, rng)
    must_fail = fault is not None or drawn.hindered()
    try:
        with _asked_for(drawn.way), torch.inference_mode(rng.random() < 0.2):
            wrong = drawn.compare() if not must_fail else drawn.call() and 'not refused'
    except REFUSALS as error:
        wrong = REFUSED if must_fail else f'{type(error).__name__}: {error}'
    except BaseException as error:  # noqa: BLE001  (whatever else it is, it is wrong)
        wrong = f'{type(error).__name__}: {error}'
    return wrong if wrong in ('', REFUSED) else f'{wrong} [{drawn}, fault: {fault}]'


@contextmanager
def _asked_for(way: str | None) -> Iterator[None]:
    before = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    if way is not None:
        os.environ[ENVIRONMENT_VARIABLE] = way
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before
class Drawn:
    """An operator and its arguments.

    Attributes:
        name: A key of :data:`OPERATORS`.
        way: Way asked for through the environment.
        arguments: By name, of all operators; each takes what it needs.
    """

    def __init__(self, rng: random.Random, setting: Setting) -> None:
        self.rng = rng
        self.name = rng.choice(list(OPERATORS))
        self.way = rng.choice((None, None, *WAYS))
        backend = rng.choice((None, 'auto', 'torch', 'torch', 'taichi'))
        compiled = backend != 'torch' or (self.way is not None and WAYS[self.way].backends == ('taichi',))
        size = setting.kernel_size if compiled else rng.randint(1, LARGEST_SIZE)
        self.dtype = setting.dtype if compiled else rng.choice(DTYPES)
        padding = setting.padding if compiled else rng.choice(('full', 'same'))
        width = rng.choice(setting.widths) if compiled else rng.randint(1, LARGEST_WIDTH)
        focus_length, height = rng.randint(1, 4 * size + 3), rng.randint(1, 12)
        batch, channels, shuffles = rng.choice((0, 1, 1, 2, 3)), rng.randint(1, 4), rng.choice((1, 1, 2))
        groups = num_groups(focus_length, size)
        maps = rng.randint(1, groups + 2)
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        image = (batch, channels, height, width)
        rows, columns = (map_size(side, size, padding) for side in (height, width))
        kept = rng.choice((0., 0.3, 0.6, 1.))
        mask = None if rng.random() < 0.3 else self._placed(
            torch.rand(channels, maps, generator=self.generator) < kept)
        weight = self._noise(channels, maps, size, size)
        wiring = torch.randint(maps, (shuffles, channels, 2 * groups + 1), generator=self.generator)
        self.arguments: dict[str, Any] = dict(
            x=self._noise(*image),
            y=self._noise(batch, channels * maps, rows, columns),
            weight=weight if mask is None else self._placed(weight * mask[:, :, None, None]),
            grad_h=self._noise(*image), grad_v=self._noise(*image), grad_i=self._noise(*image),
            wiring=self._placed(wiring.to(rng.choice((torch.int32, torch.int64)))), mask=mask, maps=maps,
            focus_length=focus_length, kernel_size=size, padding=padding, backend=backend,
            need_x=True, need_weight=True)

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return f'{value.dtype} {list(value.shape)} {value.stride()}' if isinstance(value, Tensor) else repr(value)
        used = ', '.join(f'{name}={text(self.arguments[name])}' for name in OPERATORS[self.name].takes)
        return f'{self.name}({used}), way {self.way}, {torch.get_num_threads()} threads'

    def _noise(self, *shape: int) -> Tensor:
        return self._placed(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype))

    def _placed(self, values: Tensor) -> Tensor:
        """The values in some layout, at some offset, and perhaps beside a page that nobody may read."""
        rng, axes = self.rng, list(range(values.ndim))
        order = rng.choice((axes, axes, [*axes[:-2], axes[-1], axes[-2]], [axes[0], *axes[2:], axes[1]]))
        strides, step = [0] * values.ndim, rng.choice((1, 1, 1, 2))
        for axis in reversed(order):
            strides[axis], step = step, step * (values.shape[axis] + rng.choice((0, 0, 0, 1)))
        if rng.random() < 0.1:
            strides[0] = 0  # expanded
        return place(values, strides, rng.choice((0, 0, 1, 2, 3)), rng.choice(GUARDS))

    def taken(self) -> dict[str, Any]:
        """The arguments that the operator takes."""
        return {name: self.arguments[name] for name in OPERATORS[self.name].takes}

    def faults(self) -> list[str]:
        """Names of what can be made wrong in the arguments."""
        operator = OPERATORS[self.name]
        return [name for name in FAULTS if name.split()[0] in set(operator.takes) - set(operator.sound)
                and not (name.startswith('mask') and self.arguments['mask'] is None)]

    def hindered(self) -> bool:
        """Whether the way asked for cannot run."""
        if self.way is None or 'weight' not in OPERATORS[self.name].takes:
            return False
        names = ('x', 'weight', 'wiring', 'mask', 'focus_length', 'padding', 'backend')
        return WAYS[self.way].obstacle(Call(*(self.arguments[name] for name in names))) is not None

    def call(self) -> tuple[Tensor, ...]:
        """The operator's results."""
        return OPERATORS[self.name].call(**self.taken())

    def compare(self) -> str:
        """Say how the results differ from those in float64, and the bounds from the same sums of absolute values."""
        seen, taken = self.call(), self.taken()
        double = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                  for name, value in taken.items()}
        sizes = {name: value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
                 for name, value in double.items()}
        reference = OPERATORS[self.name].reference
        with torch.inference_mode(False):
            wanted, bounds = reference(**_copied(double)), reference(**_copied(sizes))
        precision = torch.finfo(self.dtype)
        unit = ROUNDINGS[self.dtype] * precision.eps
        # below the smallest normal number roundings are as large as there
        bounds = [bound + precision.smallest_normal for bound in bounds]
        for place_, (out, want, bound) in enumerate(zip(seen, wanted, bounds, strict=True)):
            if out.shape != want.shape or out.dtype != self.dtype:
                return f'result {place_} is {out.dtype} {list(out.shape)}, not {self.dtype} {list(want.shape)}'
            off = (out.double() - want).abs()
            if not (off <= unit * bound).all():  # NaN, too
                return f'result {place_} is off by {off.max():.1e} where {float((unit * bound).max()):.1e} is allowed'
        return ''


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    # outside of the inference mode, tensors made in it cannot be differentiated
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


# -- the operators, and what they must give ----------------------------------------------------------------------------


class Operator(NamedTuple):
    """An operator.

    Attributes:
        takes: Names of its arguments.
        call: It, by these names.
        reference: What it must give, in float64.
        sound: Arguments that are not spoiled.
    """
    takes: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    sound: tuple[str, ...] = ()


def _differentiated(forward: Callable[..., tuple[Tensor, ...]], *differentiable: str) -> Callable[..., Any]:
    """A function that gives the results, and the gradients of some arguments, of another."""
    def call(grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return call(grad_h, grad_v, grad_i, **arguments)
        inputs = [arguments[name].detach().requires_grad_() for name in differentiable]
        outs = forward(**arguments | dict(zip(differentiable, inputs, strict=True)))
        return *(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, (grad_h, grad_v, grad_i))
    return call


def _shift_add64(y, wiring, focus_length, kernel_size, padding, **_) -> tuple[Tensor, ...]:
    return shift_add_torch(y, wiring, focus_length, kernel_size, padding)


def _conv64(x, weight, wiring, mask, focus_length, padding, **_) -> tuple[Tensor, ...]:
    return reference_conv2d(
        x, weight if mask is None else weight * mask[:, :, None, None], wiring, focus_length, padding)


def _shift_add_backward64(grad_h, grad_v, grad_i, wiring, maps, kernel_size, padding, **rest) -> tuple[Tensor, ...]:
    batch, channels, *sides = grad_h.shape
    y = grad_h.new_zeros(batch, channels * maps, *(map_size(side, kernel_size, padding) for side in sides))
    given = _differentiated(_shift_add64, 'y')
    return given(grad_h, grad_v, grad_i, y=y, wiring=wiring, kernel_size=kernel_size, padding=padding, **rest)[3:]


def _raw_conv_backward(mask, **arguments) -> tuple[Tensor, ...]:
    grad_x, grad_weight = raw.shiftwise_conv2d_backward(mask=mask, **arguments)
    # who calls it multiplies the kernels by the mask, and so their gradients
    return grad_x, grad_weight if mask is None else grad_weight * mask[:, :, None, None]


def _layer(**arguments) -> tuple[Tensor, ...]:
    layer, x = _built(**arguments)
    return layer(x), layer.fuse()(x)


def _layer64(**arguments) -> tuple[Tensor, ...]:
    layer, x = _built(**arguments)
    layer.backend = 'torch'
    with _asked_for('shift'):
        out = layer(x)
    return out, out


def _built(x, weight, wiring, mask, focus_length, padding, backend) -> tuple[ShiftwiseConv2d, Tensor]:
    """A layer with the small kernels cut or repeated to the number that it has."""
    layer = ShiftwiseConv2d(
        x.shape[1], focus_length, weight.shape[2], operator='p_sw', padding=padding, backend=backend, dtype=x.dtype)
    chosen = torch.arange(layer.num_maps) % weight.shape[1]
    with torch.no_grad():
        layer.kernels.copy_(weight[:, chosen])
        if mask is not None:
            layer.group_mask.copy_(mask[:, chosen])
    return layer.eval(), x


_SHIFT = ('wiring', 'focus_length', 'kernel_size', 'padding', 'backend')
_CONV = ('x', 'weight', 'wiring', 'mask', 'focus_length', 'padding', 'backend')
_GRADS = ('grad_h', 'grad_v', 'grad_i')

OPERATORS = {
    'shift_add': Operator(
        ('y', *_SHIFT, *_GRADS), _differentiated(shift_add, 'y'), _differentiated(_shift_add64, 'y'), sound=_GRADS),
    'shiftwise_conv2d': Operator(
        (*_CONV, *_GRADS), _differentiated(shiftwise_conv2d, 'x', 'weight'), _differentiated(_conv64, 'x', 'weight'),
        sound=_GRADS),  # PyTorch itself gives gradients the right dtype
    'raw shift_add': Operator(('y', *_SHIFT), raw.shift_add, _shift_add64),
    'raw shift_add_backward': Operator(
        (*_GRADS, 'maps', *_SHIFT), lambda **arguments: (raw.shift_add_backward(**arguments),), _shift_add_backward64),
    'raw shiftwise_conv2d': Operator(_CONV, raw.shiftwise_conv2d, _conv64),
    'raw shiftwise_conv2d_backward': Operator(
        (*_GRADS, *_CONV, 'need_x', 'need_weight'), _raw_conv_backward,
        lambda need_x, need_weight, **arguments: _differentiated(_conv64, 'x', 'weight')(**arguments)[3:]),
    # the layer is made to fit these, and has a wiring of its own
    'ShiftwiseConv2d': Operator(_CONV, _layer, _layer64, sound=('x', 'weight', 'wiring', 'mask')),
}


# -- what may be wrong -------------------------------------------------------------------------------------------------


def _element(value: int | None = None) -> Callable[[dict[str, Any], random.Random], None]:
    """Put a value into one element of the wiring; None is K, the first that is too large."""
    def spoil(arguments: dict[str, Any], rng: random.Random) -> None:
        wiring = arguments['wiring'] = arguments['wiring'].clone()
        place_ = tuple(rng.randrange(side) for side in wiring.shape)
        wiring[place_] = arguments['maps'] if value is None else value
    return spoil


def _put(name: str, *values: Any) -> Callable[[dict[str, Any], random.Random], None]:
    return lambda arguments, rng: arguments.update({name: rng.choice(values)})


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], random.Random], None]:
    return lambda arguments, rng: arguments.update({name: change(arguments[name])})


# by name, whose first word is the argument that is spoiled
FAULTS: dict[str, Callable[[dict[str, Any], random.Random], None]] = {
    'wiring with K': _element(),
    'wiring with -1': _element(-1),
    'wiring with a huge index': _element(10 ** 6),
    'wiring too short': _change('wiring', lambda wiring: wiring[:, :, :-1]),
    'wiring too wide': _change('wiring', lambda wiring: torch.cat([wiring, wiring], 1)),
    'wiring of floats': _change('wiring', torch.Tensor.double),
    'wiring without orders': _change('wiring', lambda wiring: wiring[:0]),
    'focus_length': _put('focus_length', 0, -3),
    'kernel_size': _put('kernel_size', 0, -1),
    'padding': _put('padding', 'valid', ''),
    'backend': _put('backend', 'triton', ''),
    'x of integers': _change('x', torch.Tensor.int),
    'x of three axes': _change('x', lambda x: x.flatten(0, 1)),
    'x without rows': _change('x', lambda x: x[:, :, :0]),
    'x of more channels': _change('x', lambda x: torch.cat([x, x], 1)),
    'y of complex numbers': _change('y', lambda y: y.to(torch.complex64)),
    'y of three axes': _change('y', lambda y: y.flatten(0, 1)),
    'y of a row': _change('y', lambda y: y[:, :, :0]),
    'weight of another dtype': _change(
        'weight', lambda weight: weight.to(torch.float64 if weight.dtype == torch.float32 else torch.float32)),
    'weight that is not square': _change('weight', lambda weight: torch.cat([weight, weight], 3)),
    'weight of fewer axes': _change('weight', lambda weight: weight.flatten(2)),
    'mask of numbers': _change('mask', torch.Tensor.float),
    'mask of another shape': _change('mask', lambda mask: torch.cat([mask, mask], 1)),
    'maps': _put('maps', 0, -2),
    'grad_h of another shape': _change('grad_h', lambda grad: torch.cat([grad, grad], 3)),
    'grad_v of another dtype': _change(
        'grad_v', lambda grad: grad.to(torch.float64 if grad.dtype == torch.float32 else torch.float32)),
}
