"""A step of a network counts once, whichever and however many optimisers take it, and none breaks another's."""
import copy
import warnings

import pytest
import torch
from sparse_runs import backward, make_model, masks_of, pruned_weights, same, train_steps
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from timm_shiftwise.sparsity.schedule import FIXED, RUNNING, WAITING

STEPS = 6


def networks(count: int = 2, **kwargs) -> list[nn.Module]:
    """Networks of the same weights."""
    first = make_model(**kwargs)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters in two parts, both of which have small kernels among them."""
    parts = [model.stem, *model.stages[:2]], [*model.stages[2:], model.head]
    return [[parameter for module in part for parameter in module.parameters()] for part in parts]


def step_all(optimizers, generator: torch.Generator, model: nn.Module, skip: int | None = None) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    backward(model, generator)
    for i, optimizer in enumerate(optimizers):
        if i != skip:
            optimizer.step()


def assert_pruned_are_zero(model: nn.Module) -> None:
    for layer in model.sparsity.layers():
        assert layer.kernels[pruned_weights(layer)].eq(0).all()


@pytest.mark.parametrize('kind', [torch.optim.AdamW, torch.optim.SGD])
def test_weights_split_over_two_optimizers_train_as_with_one(kind):
    whole, split = networks()
    optimizers = [kind(part, lr=0.01) for part in halves(split)]
    train_steps(whole, kind(whole.parameters(), lr=0.01), STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        step_all(optimizers, generator, split)
        assert split.sparsity.step == step + 1
    assert not same(masks_of(whole), masks_of(make_model()))
    for (name, a), b in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_that_one_of_two_optimizers_skips_counts_once():
    model, = networks(1)
    optimizers = [torch.optim.SGD(part, lr=0.01, momentum=0.9) for part in halves(model)]
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        step_all(optimizers, generator, model, skip=1 if step == 3 else None)
        # the step that was not complete is counted when the next one begins
        assert model.sparsity.step == step + (step != 3)


def test_one_optimizer_for_each_weight_stepped_in_the_backward_pass():
    model, = networks(1, prune_interval=2)
    kept = sum(mask.numel() for mask in masks_of(model)) * 0.6
    seen = []
    for parameter in model.parameters():
        optimizer = torch.optim.AdamW([parameter], lr=1e-3)

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    generator = torch.Generator().manual_seed(0)
    for i in range(STEPS):
        backward(model, generator)
        assert (int(model.sparsity.phase), int(model.sparsity.step)) == (RUNNING, i + 1)
        assert_pruned_are_zero(model)
        seen.append(masks_of(model))
    assert sum(int(mask.sum()) for mask in seen[0]) == pytest.approx(kept, abs=3)  # a layer of 99 % is dense
    assert same(seen[1], seen[2]) and not same(seen[2], seen[3])


def test_lookahead_counts_once_and_its_slow_weights_are_pruned_too():
    model, = networks(1)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = Lookahead(base, k=3)
    train_steps(model, optimizer, 8)
    assert model.sparsity.step == 8
    assert_pruned_are_zero(model)
    for layer in model.sparsity.layers():
        assert base.state[layer.kernels]['lookahead_slow_buff'][pruned_weights(layer)].eq(0).all()


def test_weights_that_no_optimizer_holds_are_not_waited_for():
    model, = networks(1)
    optimizer = torch.optim.SGD([p for stage in (model.stem, *model.stages[2:]) for p in stage.parameters()], lr=0.1)
    train_steps(model, optimizer, STEPS)
    assert model.sparsity.step == STEPS


def test_a_step_that_fails_is_no_step():
    model, = networks(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_steps(model, optimizer, 2)

    def fail():
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fail)
    train_steps(model, optimizer, 2)
    assert model.sparsity.step == 4


@pytest.mark.parametrize('make', [
    lambda parameters: torch.optim.AdamW(parameters),
    lambda parameters: torch.optim.Adagrad(parameters),  # whose state is there before its first step
    lambda parameters: Lookahead(torch.optim.AdamW(parameters)),
])
def test_whether_an_optimizer_is_new_is_told_by_the_state_of_the_weights(make):
    model, = networks(1)
    train_steps(model, make(model.parameters()), 3)
    masks = masks_of(model)
    optimizer = make(model.parameters())
    model.zero_grad()
    model.stem[0].weight.grad = torch.ones_like(model.stem[0].weight)
    optimizer.step()  # from now on it is new to all but the stem
    train_steps(model, optimizer, 3)
    assert model.sparsity.phase == FIXED and same(masks, masks_of(model))


def test_a_new_optimizer_of_some_weights_beside_the_old_one_ends_nothing():
    model, = networks(1)
    first, second = halves(model)
    old, new = torch.optim.AdamW(first), torch.optim.AdamW(second)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        step_all([old, new], generator, model)
    new = torch.optim.AdamW(second)
    for _ in range(3):
        step_all([old, new], generator, model)
    assert (int(model.sparsity.phase), int(model.sparsity.step)) == (RUNNING, 5)


class Same(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize('spoil', [
    lambda layer: parametrize.register_parametrization(layer, 'kernels', Same()),
    lambda layer: delattr(layer, 'kernels'),
], ids=['parametrized', 'deleted'])
def test_a_network_that_cannot_be_followed_is_named_once_and_breaks_no_others_step(spoil):
    spoiled, other = networks()
    spoil(spoiled.stages[1].blocks[0].conv_dw)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (spoiled, other)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        train_steps(other, optimizers[1], 3)
        optimizers[0].step()
    messages = [str(warning.message) for warning in told if 'sparsity schedule' in str(warning.message)]
    assert len(messages) == 1 and 'stages.1.blocks.0.conv_dw.kernels' in messages[0] and 'sparsity=0' in messages[0]
    assert other.sparsity.step == 3
    assert spoiled.sparsity.phase == WAITING and all(mask.all() for mask in masks_of(spoiled))


# --- the buffers are the truth -------------------------------------------------------------------------------------

def averaged(early: nn.Module, model: nn.Module) -> nn.Module:
    average = AveragedModel(early)
    average.update_parameters(model)
    return average.module


def ema(early: nn.Module, model: nn.Module) -> nn.Module:
    average = ModelEmaV3(early, decay=0.5)
    average.update(model)
    return average.module


def copied(early: nn.Module, model: nn.Module) -> nn.Module:
    for mine, its in zip(early.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(its)
    return early


@pytest.mark.parametrize('average', [averaged, ema, copied])
def test_fine_tuning_what_was_averaged_along_with_a_run_keeps_its_masks(average):
    model, early = networks()
    train_steps(model, torch.optim.AdamW(model.parameters()), 3)
    tuned = average(early, model)
    assert (int(tuned.sparsity.phase), int(tuned.sparsity.step)) == (RUNNING, 3)
    train_steps(tuned, torch.optim.AdamW(tuned.parameters()), 3)
    assert tuned.sparsity.phase == FIXED and same(masks_of(tuned), masks_of(model))


def test_what_somebody_else_writes_into_the_buffers_counts():
    model = make_model(prune_interval=5)
    optimizer = torch.optim.AdamW(model.parameters())
    train_steps(model, optimizer, 1)
    before = masks_of(model)
    model.sparsity.step.fill_(14)
    train_steps(model, optimizer, 1)
    assert model.sparsity.step == 15 and not same(before, masks_of(model))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on an accelerator, and counts how often its value is waited for."""
    waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device('cuda')
        if function in (torch.Tensor.__int__, torch.Tensor.item):
            cls.waits += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_on_an_accelerator_a_step_waits_for_no_buffer_unless_somebody_wrote_it():
    model = make_model(prune_interval=100)
    for name in ('phase', 'step'):
        setattr(model.sparsity, name, getattr(model.sparsity, name).as_subclass(Elsewhere))
    optimizer = torch.optim.AdamW(model.parameters())
    train_steps(model, optimizer, 2)
    waits = Elsewhere.waits
    train_steps(model, optimizer, 5)
    assert Elsewhere.waits == waits
    model.sparsity.step.copy_(torch.tensor(30))
    train_steps(model, optimizer, 1)
    assert Elsewhere.waits == waits + 2 and model.sparsity._state() == (RUNNING, 31)


@pytest.mark.parametrize('key, value, told', [
    ('sparsity.step', torch.tensor(-3), '-3'),
    ('sparsity.step', torch.tensor(2 ** 63 - 1), '9223372036854775807'),
    ('sparsity.step', torch.tensor(float('nan')), 'nan'),
    ('sparsity.step', torch.tensor(2j), 'complex'),
    ('sparsity.phase', torch.tensor(7), '7'),
    ('sparsity.phase', torch.tensor(2.5), ''),
    ('sparsity.phase', torch.tensor([1, 1]), ''),
    ('stages.1.blocks.0.conv_dw.kernels', torch.tensor(float('nan')), 'NaN'),
    ('head.fc.weight', torch.tensor(1j), 'complex'),
    ('stages.1.blocks.0.conv_dw.group_mask', torch.tensor(float('nan')), 'NaN'),
], ids=str)
@pytest.mark.parametrize('wrap, prefix', [(lambda model: model, ''), (nn.Sequential, '0.')])
def test_values_that_no_run_has_are_refused_and_change_nothing(wrap, prefix, key, value, told):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    state = {f'{prefix}{name}': torch.zeros_like(own) if own.is_floating_point() else own
             for name, own in copy.deepcopy(before).items()}
    is_one = value.numel() != 1 or state[prefix + key].ndim == 0
    state[prefix + key] = value if is_one else value.expand_as(state[prefix + key]).clone()
    with pytest.raises(RuntimeError) as error:
        wrap(model).load_state_dict(state)
    assert key in str(error.value) and told in str(error.value)
    for name, now in model.state_dict().items():
        assert torch.equal(now, before[name]), name
