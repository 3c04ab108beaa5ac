"""Mixed and pure precisions, and memory formats: no silent upcasts, nothing that is not finite, and errors as stated.

Of the float32 maps in a network of lower precision there are

* under autocast, as many as in timm's ConvNeXt of the same sizes: those that follow a layer scale or a global response
  normalisation, whose parameters are float32, and the residual sums with them; none in a merged network without the
  latter;
* in a bfloat16 or float16 network, none;
* besides, in both, the sums of the shift-add in plain PyTorch, which runs where windows are dropped at the border
  (``padding='same'``) and Taichi cannot run.
"""
import copy
from collections import Counter
from typing import NamedTuple

import pytest
import timm
import torch
from families import FAMILIES, FOUR_STAGES, assert_all_close, image, make, merged, unsettle
from pairwise import pairwise
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_shiftwise.models import ShiftwiseNetV2

# what Taichi's kernels do in each precision is tested with the kernels; here they run where they always do
CASES = [*((family, 'torch') for family in FAMILIES), ('p2_sw', 'taichi')]

BATCH = 11
"""Unlike any number of channels, so that the first axis tells maps from kernels."""


class Precision(NamedTuple):
    """The type of a network's weights, and that of autocast if it is on."""
    weights: torch.dtype
    autocast: torch.dtype | None = None

    def of(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(self.weights)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast('cpu', self.autocast, enabled=self.autocast is not None):
            return model(x.to(self.weights))


PRECISIONS = {
    'float32': Precision(torch.float32),
    'bfloat16 autocast': Precision(torch.float32, torch.bfloat16),
    'float16 autocast': Precision(torch.float32, torch.float16),
    'bfloat16': Precision(torch.bfloat16),
    'float16': Precision(torch.float16),
}
LOW = (torch.bfloat16, torch.float16)

ERRORS = {
    'float32': (2e-6, 2e-6),
    'bfloat16 autocast': (2e-2, 3e-2),
    'float16 autocast': (3e-3, 5e-3),
    'bfloat16': (3e-2, 5e-2),
    'float16': (4e-3, 6e-3),
}
"""Bounds on the distance from the float64 network, as a share of its norm: of the logits, and of all gradients.

About twice the largest that was measured. timm's ConvNeXt: 4e-7, 8e-3, 9e-4, 1e-2 and 1e-3 for the logits.
"""

ERRORS_V2 = {
    'float32': (2e-6, 2e-6),
    'bfloat16 autocast': (6e-2, 4e-2),
    'float16 autocast': (8e-3, 6e-3),
    'bfloat16': (1.5e-1, 1e-1),
    'float16': (1e-2, 6e-3),
}
"""The same for ``sw_v2``, whose BatchNorms keep their statistics in the weights' type."""


@pytest.fixture(params=CASES, ids='-'.join)
def model(request):
    """A network in training mode."""
    family, backend = request.param
    if backend == 'taichi':
        request.getfixturevalue('needs_taichi')
    # Taichi's kernels are compiled for every type and size of kernel: small ones sooner
    kernel_size = {'kernel_size': 3} if backend == 'taichi' else {}
    return unsettle(make(family, **FOUR_STAGES, backend=backend, **kernel_size), seed=3)


def convnext(**kwargs) -> nn.Module:
    """timm's ConvNeXt of the same sizes."""
    sizes = {key: FOUR_STAGES[key] for key in ('depths', 'dims', 'num_classes')}
    model = timm.create_model('convnext_atto', **sizes, conv_mlp=False, ls_init_value=0.5, **kwargs)
    unsettle(model)
    return model


def train_step(precision: Precision, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and the gradients of every parameter."""
    logits = precision.run(model, x)
    logits.double().square().mean().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


class Watch(TorchDispatchMode):
    """Notes the result of every operator of PyTorch, also of those within the operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.float_types: set[torch.dtype] = set()
        self.float32_maps: Counter[str] = Counter()
        self.upcast_maps: Counter[tuple[str, torch.Size]] = Counter()
        self._within: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in OPDEFS:
            self._within.append(name)
            with self:
                out = OPDEFS[name]._init_fn(*args, **(kwargs or {}))
            self._within.pop()
        else:
            out = func(*args, **(kwargs or {}))
        low = any(_is_map(tensor) and tensor.dtype in LOW for tensor in tree_leaves((args, kwargs)))
        for result in filter(_is_tensor, tree_leaves(out)):
            if result.is_floating_point():
                self.float_types.add(result.dtype)
            if _is_map(result) and result.dtype == torch.float32 and not self._sums_of_shift_add():
                self.float32_maps[name] += 1
                if low:
                    self.upcast_maps[name, result.shape] += 1
        return out

    def _sums_of_shift_add(self) -> bool:
        return bool(self._within) and self._within[-1].startswith('timm_shiftwise::shift_add')


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def _is_map(value) -> bool:
    # a norm's statistics have one value where maps have channels
    return _is_tensor(value) and value.ndim >= 4 and value.shape[0] % BATCH == 0 and value.shape[-1] > 1


def watch_training(precision: Precision, model: nn.Module) -> Watch:
    """What a step of training makes."""
    model, x = precision.of(model).train(), image(BATCH, 3, 64, 64)
    with Watch() as watch:
        train_step(precision, model, x)
    return watch


@torch.no_grad()
def watch_inference(precision: Precision, model: nn.Module) -> Watch:
    """What inference with the merged network makes."""
    model, x = merged(precision.of(model)), image(BATCH, 3, 64, 64)
    with Watch() as watch:
        precision.run(model, x)
    return watch


# --- upcasts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_autocast_casts_no_more_maps_to_float32_than_in_timms_convnext(model, dtype):
    precision = Precision(torch.float32, dtype)
    has_grn = isinstance(model, ShiftwiseNetV2)
    allowed = watch_training(precision, convnext(use_grn=has_grn)).upcast_maps
    assert allowed.total() > 0
    assert watch_training(precision, model).upcast_maps <= allowed
    assert watch_inference(precision, model).upcast_maps <= (allowed if has_grn else Counter())


@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_a_network_of_low_precision_makes_no_float32_maps(model, dtype):
    precision = Precision(dtype)
    for watch in (watch_training(precision, model), watch_inference(precision, model)):
        assert dtype in watch.float_types and not watch.float32_maps


def test_a_float64_network_is_float64_throughout(model):
    # autocast leaves float64 alone in PyTorch's operators, and so in ours
    for precision in (Precision(torch.float64), Precision(torch.float64, torch.bfloat16)):
        assert watch_training(precision, model).float_types == {torch.float64}
        assert watch_inference(precision, model).float_types == {torch.float64}


# --- errors ---------------------------------------------------------------------------------------------------------

def distance(seen: list[Tensor], wanted: list[Tensor]) -> float:
    """Norm of the difference as a share of the norm."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (seen, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize('name', PRECISIONS)
def test_the_error_of_a_precision_is_bounded(model, name):
    precision, exact, x = PRECISIONS[name], Precision(torch.float64), image(4, 3, 64, 64)
    limit, limit_gradient = (ERRORS_V2 if isinstance(model, ShiftwiseNetV2) else ERRORS)[name]
    logits, gradients = train_step(precision, precision.of(model), x)
    wanted, wanted_gradients = train_step(exact, exact.of(model), x)
    assert logits.dtype == (precision.autocast or precision.weights)
    assert all(gradient.dtype == precision.weights for gradient in gradients)
    assert distance([logits], [wanted]) < limit
    assert distance(gradients, wanted_gradients) < limit_gradient
    with torch.no_grad():
        wanted = exact.run(exact.of(model).eval(), x)
        for form in (precision.of(model).eval(), merged(precision.of(model))):
            assert distance([precision.run(form, x)], [wanted]) < limit


# --- sizes ----------------------------------------------------------------------------------------------------------

@pairwise({'model': CASES, 'name': PRECISIONS, 'height, width': [(384, 128), (32, 32), (33, 97)]}, indirect=['model'])
def test_odd_sizes_give_nothing_that_is_not_finite(model, name, height, width):
    precision = PRECISIONS[name]
    model, single, pair = precision.of(model), image(1, 3, height, width), image(2, 3, height, width)
    # a BatchNorm in training needs two values at least, and the last map may have but one pixel
    for training, x in ((False, single), (True, pair)):
        model.train(training).zero_grad()
        logits, gradients = train_step(precision, model, x)
        assert logits.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        assert precision.run(merged(model), single).isfinite().all()


def test_training_on_one_value_a_channel_is_an_error(model):
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(image(1, 3, 32, 32))


# --- memory formats -------------------------------------------------------------------------------------------------

def stages_in_channels_last(model: nn.Module, x: Tensor) -> list[bool]:
    """Whether each stage's output is laid out channels last."""
    seen: list[bool] = []
    hooks = [
        stage.register_forward_hook(
            lambda module, inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
        for stage in model.stages
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_channels_last_gives_the_same_gradients_and_goes_on_as_in_timms_convnext(model):
    plain, x = PRECISIONS['float32'], image(2, 3, 64, 64)
    logits, gradients = train_step(plain, copy.deepcopy(model), x)
    in_eval = copy.deepcopy(model).eval()(x)
    model, last = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    seen, seen_gradients = train_step(plain, copy.deepcopy(model), last)
    assert_all_close([seen, *seen_gradients], [logits, *gradients])
    with torch.no_grad():
        for form in (copy.deepcopy(model).eval(), merged(model), merged(model).to(memory_format=torch.channels_last)):
            for x_in_format in (x, last):
                assert_all_close([form(x_in_format)], [in_eval], atol=1e-4)
            assert stages_in_channels_last(form, last) == [True] * 4
        theirs = convnext().to(memory_format=torch.channels_last)
        assert stages_in_channels_last(theirs, last) == stages_in_channels_last(model, last) == [True] * 4


# --- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
def test_float16_autocast_trains_with_a_scaled_loss(family):
    model, x, target = make(family, backend='torch'), image(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 24, backoff_factor=2. ** -8)  # overflows at first
    losses, scales = [], []
    for _ in range(12):
        with torch.autocast('cpu', torch.float16):
            loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert 2. ** 24 > scales[2] == scales[-1]
    assert losses[-1] < 0.5 * losses[0]
