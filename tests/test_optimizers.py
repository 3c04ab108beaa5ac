"""Sparse training under every optimiser of torch.optim and of timm that runs on a CPU, and what grows under it."""
import copy
from functools import partial

import pytest
import torch
from sparse_runs import make_model, pruned_weights, train_steps
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from timm_shiftwise.sparsity.optimizer_state import SECOND_MOMENTS, exchange_state

pytestmark = pytest.mark.filterwarnings('ignore:It is highly recommended to have:UserWarning')

STEPS, INTERVAL = 30, 5
TINY = dict(depths=(1,), dims=(8,), focus_lengths=(9,), kernel_size=3, prune_interval=INTERVAL, sparsity_steps=100)
OF_OTHERS = ('bnb', 'fused')
"""Prefixes of timm's optimisers that need bitsandbytes or Apex, and a GPU."""


def names() -> list[str]:
    return [name for name in list_optimizers() if not name.startswith(OF_OTHERS)]


@pytest.mark.parametrize('name', names())
def test_an_optimizer_of_timm_trains_sparse(name):
    torch.manual_seed(0)
    model = make_model(**TINY)
    optimizer = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.01)
    x, (layer,), seen = torch.randn(2, 3, 8, 8), model.sparsity.layers(), []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(x).square().mean().backward(create_graph=name == 'adahessian')
        optimizer.step()
        assert layer.kernels[pruned_weights(layer)].eq(0).all()
        if step % INTERVAL == 0:
            seen.append(layer.group_mask.clone())
            grown = seen[-1] & ~seen[-2] if len(seen) > 1 else torch.zeros_like(seen[-1])
            assert layer.kernels[grown].eq(0).all(), 'what grows starts from zero'
    assert model.sparsity.step == STEPS
    assert {int(path.sum()) for mask in seen for path in mask} == {round(0.6 * layer.group_mask[0].numel())}
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) > 2
    state = [value for value in optimizer.state[layer.kernels].values() if isinstance(value, Tensor)]
    assert all(value.isfinite().all() for value in [layer.kernels, *state])


def test_each_state_that_scales_a_step_is_listed():
    """Of the states of all optimisers that have the weight's shape, those below are first moments and copies."""
    others = {
        'exp_avg', 'exp_avg_diff', 'grad_avg', 'momentum', 'momentum_buffer', 'neg_pre_grad', 'last_grad', 'prev', 's',
        'x0', 'ax', 'lookahead_slow_buff', 'step_size',
    }
    seen = set()
    torch_ones = [
        partial(getattr(torch.optim, name), **kwargs)
        for name, kwargs in (
            ('Adam', dict(amsgrad=True)), ('ASGD', {}), ('Rprop', {}), ('RMSprop', dict(momentum=.9, centered=True)),
            ('Adafactor', {}), ('Adamax', {}), ('RAdam', {}), ('NAdam', {}), ('Adagrad', {}), ('Adadelta', {}),
        )]
    timm_ones = [
        partial(create_optimizer_v2, opt=name, lr=1e-3, **kwargs) for name, kwargs in (
            *((name, {}) for name in names() if name != 'adahessian'), ('adabelief', dict(amsgrad=True)))]
    for build in torch_ones + timm_ones:
        weight = nn.Parameter(torch.randn(2, 2, 3, 3, 3))
        optimizer = build([weight])
        for _ in range(2):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        seen |= {key for key, value in optimizer.state[weight].items()
                 if isinstance(value, Tensor) and value.shape == weight.shape}
    assert seen - others <= SECOND_MOMENTS
    assert seen - others | {'exp_hessian_diag_sq'} == SECOND_MOMENTS


def test_what_grows_has_second_moments_as_those_that_stand_have_on_average():
    keep, grown = torch.tensor([[[1, 1, 0, 0]]]).bool(), torch.tensor([[[0, 0, 1, 0]]]).bool()
    weight = nn.Parameter(torch.zeros(1, 1, 4, 2, 2))
    groups = torch.tensor([1., 3., 8., 9.]).view(1, 1, 4, 1, 1)
    row = torch.zeros(4)
    state = dict(
        exp_avg=groups * torch.ones_like(weight), exp_avg_sq=groups * torch.ones_like(weight),
        x0=groups * torch.ones_like(weight), exp_avg_sq_row=row, step=torch.tensor(7.))
    exchange_state([state], weight, keep, grown)
    assert state['exp_avg'][0, 0, :, 0, 0].tolist() == [1., 3., 0., 0.]
    assert state['exp_avg_sq'][0, 0, :, 0, 0].tolist() == [1., 3., 2., 0.]
    assert state['x0'][0, 0, :, 0, 0].tolist() == [1., 3., 0., 0.], 'as the weight, which starts from zero'
    assert state['exp_avg_sq_row'] is row and state['step'] == 7
    exchange_state([state], weight, torch.zeros_like(keep), grown)
    assert all(state[key].eq(0).all() for key in ('exp_avg', 'exp_avg_sq', 'x0')), 'no group stands: zero, not NaN'


def test_an_exchange_sets_the_state_of_what_grows():
    first = make_model(prune_interval=3, mask_sharing_interval=100, sparsity_init='uniform')
    plain = copy.deepcopy(first)
    plain.sparsity.prune_interval = 100
    optimizers = [torch.optim.Adam(model.parameters()) for model in (first, plain)]
    for model, optimizer in zip((first, plain), optimizers, strict=True):
        train_steps(model, optimizer, 3)
    for layer, other in zip(first.sparsity.layers(), plain.sparsity.layers(), strict=True):
        keep, grown = layer.group_mask & other.group_mask, layer.group_mask & ~other.group_mask
        state, before = optimizers[0].state[layer.kernels], optimizers[1].state[other.kernels]
        mean = before['exp_avg_sq'][keep].mean()
        assert grown.any() and mean > 0
        torch.testing.assert_close(state['exp_avg_sq'][grown], mean.expand_as(state['exp_avg_sq'][grown]))
        assert state['exp_avg'][grown].eq(0).all()
