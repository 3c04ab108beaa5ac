"""Grouped sparsity: masks, the schedule that follows an unmodified training loop, and what survives a stop."""
import copy
import gc
import logging
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from sparse_runs import backward, make_model, masks_of, pruned_weights, same, train_steps
from timm.utils import ModelEmaV3

from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.sparsity import follow, masks
from timm_shiftwise.sparsity.schedule import FIXED, RUNNING, WAITING

OPTIMIZERS = {
    'ASGD': dict(lr=0.01),
    'Adadelta': dict(),
    'Adafactor': dict(),
    'Adagrad': dict(),
    'Adam': dict(amsgrad=True, weight_decay=0.01),
    'AdamW': dict(lr=1e-3),
    'Adamax': dict(),
    'NAdam': dict(),
    'RAdam': dict(),
    'RMSprop': dict(momentum=0.9, centered=True),
    'Rprop': dict(),
    'SGD': dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


@pytest.mark.parametrize('value', [100., float('nan')])
def test_a_pruned_group_is_silent_on_its_path_and_gets_no_gradient(value):
    layer = ShiftwiseConv2d(4, 7, 3, num_paths=3, num_shuffles=2, backend='torch', dtype=torch.float64).eval()
    layer.group_mask[:, 1, 2] = layer.group_mask[0, 3, 0] = layer.group_mask[2, 0, 1] = False
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    out = layer(x)
    out.square().sum().backward()
    pruned = pruned_weights(layer)
    assert layer.kernels.grad[pruned].eq(0).all()
    assert layer.kernels.grad[~pruned].ne(0).all()
    merged = layer.fuse()
    torch.testing.assert_close(merged(x), out)
    kept = torch.ones(4, 3, dtype=torch.bool)
    kept[1, 2] = False
    assert torch.equal(layer.kept_groups(), kept) and torch.equal(merged.kept_groups(), kept)
    with torch.no_grad():
        layer.kernels[pruned] = value
        assert torch.equal(layer(x), out)


def test_what_a_pruned_group_held_is_gone_when_it_grows():
    model = make_model(sparsity=0.6, prune_interval=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_steps(model, optimizer, 1)
    with torch.no_grad():
        for layer in model.sparsity.layers():
            pruned = pruned_weights(layer)
            layer.kernels[pruned] = float('nan')
            optimizer.state[layer.kernels]['exp_avg_sq'][pruned] = float('inf')
    train_steps(model, optimizer, 3)  # an exchange lies among them
    for layer in model.sparsity.layers():
        assert layer.kernels.isfinite().all() and optimizer.state[layer.kernels]['exp_avg_sq'].isfinite().all()


def test_a_channel_without_groups_keeps_its_skip():
    layer = ShiftwiseConv2d(3, 7, 3, backend='torch').eval()
    layer.group_mask[:, 1] = False
    x = torch.randn(1, 3, 4, 4)
    # an untrained BatchNorm makes zero of zero
    torch.testing.assert_close(layer(x)[:, 1], x[:, 1])


def test_saliency_is_the_mean_of_weight_times_gradient():
    weight = torch.tensor([1., -2., 3., 4.]).view(1, 1, 1, 2, 2).repeat(2, 1, 3, 1, 1)
    grad = torch.ones_like(weight)
    weight[:, :, 1] = 0
    grad[1, :, 2] = -3
    # group 0: mean(1, 2, 3, 4); group 1: 0; group 2: the same on one path, three times that on the other
    assert masks.snip_saliency(weight, grad).tolist() == [[[2.5, 0., 2.5]], [[2.5, 0., 7.5]]]


def test_one_threshold_spreads_the_groups_over_the_layers():
    saliencies = [torch.tensor([[9., 1.], [8., 7.]]), torch.tensor([[0.5, 0.4]]), torch.tensor([[6., 5., 0.1]])]
    # 5 of 9 groups are kept: 9, 8, 7, 6, 5; the second layer would be left without any, the first gives one
    assert masks.snip_counts(saliencies, 4 / 9) == [2, 1, 2]
    assert masks.snip_counts(saliencies, 0.) == [4, 2, 3]
    assert masks.snip_counts(saliencies, 0.99) == [1, 1, 1]


@pytest.mark.parametrize('value', [0., float('nan'), float('inf')])
def test_useless_saliency_spreads_the_groups_evenly(value):
    saliencies = [torch.full((2, 5), value), torch.full((4, 5), value)]
    assert masks.snip_counts(saliencies, 0.4) == [6, 12]


def test_prune_rate_decays_by_a_cosine():
    assert masks.prune_rate_at(0, 100, 0.5) == pytest.approx(0.5)
    assert masks.prune_rate_at(50, 100, 0.5) == pytest.approx((0.5 + 0.005) / 2)
    assert masks.prune_rate_at(100, 100, 0.5) == pytest.approx(0.005)
    assert masks.prune_rate_at(500, 100, 0.5) == pytest.approx(0.005)


@pytest.mark.parametrize('init', ['snip', 'uniform'])
@pytest.mark.parametrize('sparsity', [0.1, 0.4, 0.9, 0.999])
def test_the_kept_share_is_the_target_at_every_update(init, sparsity):
    model = make_model(sparsity=sparsity, sparsity_init=init, prune_interval=1, mask_sharing_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    counts = None
    for step in range(5):
        train_steps(model, optimizer, 1, seed=step)
        now = masks_of(model)
        total = sum(m.numel() for m in now)
        paths = [path for m in now for path in m]
        assert abs(sum(int(m.sum()) for m in now) - (1 - sparsity) * total) <= len(paths)
        assert all(path.any() for path in paths)
        if init == 'uniform':
            assert all(abs(int(path.sum()) - (1 - sparsity) * path.numel()) <= 1 for path in paths)
        assert counts is None or counts == [int(path.sum()) for path in paths]
        counts = [int(path.sum()) for path in paths]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_pruned_groups_stay_zero_under_every_optimizer(name):
    model = make_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    seen = []
    for step in range(6):
        train_steps(model, optimizer, 1, seed=step)
        for layer in model.sparsity.layers():
            pruned = pruned_weights(layer)
            assert layer.kernels[pruned].eq(0).all()
            assert layer.kernels.grad[pruned & (layer.kernels == 0)].isfinite().all()
        seen.append(masks_of(model))
    assert model.sparsity.phase == RUNNING
    assert model.sparsity.step == 6
    assert not same(seen[0], seen[-1])


def test_an_optimizer_with_closures_trains_sparse():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    x = torch.randn(4, 3, 32, 32)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert model.sparsity.phase == RUNNING
    assert sum(int(m.sum()) for m in masks_of(model)) < sum(m.numel() for m in masks_of(model))


@pytest.mark.parametrize('step', [
    lambda optimizer, closure: optimizer.step(closure),
    lambda optimizer, closure: optimizer.step(closure=closure),
], ids=['positional', 'keyword'])
def test_a_step_that_computes_its_gradients_in_a_closure_is_a_step_like_any_other(step):
    trained = []
    for given in (False, True):
        torch.manual_seed(0)
        model, generator = make_model(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def closure(model=model, generator=generator, optimizer=optimizer):
            optimizer.zero_grad()
            backward(model, generator)

        for _ in range(5):
            if given:
                step(optimizer, closure)
            else:
                closure()
                optimizer.step()
        trained.append(model.state_dict())
    assert trained[0]['sparsity.step'] == 5
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())


def test_masks_do_not_depend_on_the_global_generator_and_leave_it():
    results = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = make_model()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(masks_of(model))
    assert same(*results)


def test_another_seed_draws_other_masks():
    torch.manual_seed(0)
    first = make_model(sparsity_seed=0)
    second = make_model(sparsity_seed=1)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert not same(masks_of(first), masks_of(second))


def test_the_log_says_once_what_is_pruned(caplog):
    caplog.set_level(logging.INFO, logger='timm_shiftwise')
    model = make_model()
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 6)
    lines = [r.getMessage() for r in caplog.records if 'Training sparse' in r.getMessage()]
    assert len(lines) == 1
    assert '40 %' in lines[0] and 'sparsity=0' in lines[0]
    assert lines[0].count(' %') == 5  # the whole and four stages


def test_no_sparsity_trains_dense_and_follows_nothing():
    model = make_model(sparsity=0)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert model.sparsity.phase == WAITING
    assert all(m.all() for m in masks_of(model))


@pytest.mark.parametrize('name', ['p_sw_tiny', 'p2_sw_tiny', 'eq_slak_tiny'])
def test_the_ablations_are_dense(name):
    assert timm.create_model(name, device='meta').sparsity.sparsity == 0


@pytest.mark.parametrize('name, settings', [
    ('sw_tiny', (0.4, 0.5, 2000, 1)),
    *((name, (0.4, 0.3, 100, 1)) for name in ('sw_small', 'sw_base')),
    *((f'sw_v2_{size}', (0.3, 0.3, 100, 131)) for size in ('tiny', 'small', 'base', 'large')),
])
def test_the_defaults_are_the_authors(name, settings):
    schedule = timm.create_model(name, device='meta').sparsity
    assert settings == (
        schedule.sparsity, schedule.prune_rate, schedule.prune_interval, schedule.mask_sharing_interval)


@pytest.mark.parametrize('fused', [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused):
    model = make_model()
    # a fused optimiser is stepped on overflow too, and skips by itself
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.)

    def step(poison: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3, 32, 32)).square().mean()).backward()
        if poison:
            model.stem[0].weight.grad.fill_(float('inf'))
        scaler.step(optimizer)
        scaler.update()

    step(poison=True)
    assert model.sparsity.phase == WAITING
    step(poison=False)
    assert (int(model.sparsity.phase), int(model.sparsity.step)) == (RUNNING, 1)
    step(poison=True)
    assert model.sparsity.step == 1


def test_gradient_accumulation_counts_optimizer_steps():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(8):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert model.sparsity.step == 2


def test_an_optimizer_of_something_else_is_not_listened_to():
    model = make_model()
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    other(torch.randn(1, 2)).sum().backward()
    optimizer.step()
    assert model.sparsity.phase == WAITING


def test_frozen_layers_are_left_alone():
    # a shared exchange gives every path the count of the first: paths apart keep the share to a group
    model = make_model(prune_interval=1, mask_sharing_interval=100)
    model.stages[0].requires_grad_(False)
    frozen = model.stages[0].blocks[0].conv_dw
    kernels = frozen.kernels.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_steps(model, optimizer, 4)
    assert frozen.group_mask.all() and torch.equal(frozen.kernels, kernels)
    rest = [layer.group_mask for layer in model.sparsity.layers()[1:]]
    total = sum(m.numel() for m in rest)
    assert abs(sum(int(m.sum()) for m in rest) - 0.6 * total) <= 1


def test_a_network_without_its_last_stages_trains_sparse():
    model = make_model()
    model.prune_intermediate_layers([1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.forward_intermediates(torch.randn(2, 3, 32, 32), intermediates_only=True)[0].square().mean().backward()
        optimizer.step()
    assert model.sparsity.phase == RUNNING
    assert not all(m.all() for m in masks_of(model))


paths_alike_or_apart = pytest.mark.parametrize('sharing', [1, 100])


@paths_alike_or_apart
def test_an_ema_copy_has_the_masks_of_its_model(sharing):
    model = make_model(prune_interval=1, mask_sharing_interval=sharing)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        train_steps(model, optimizer, 1, seed=step)
        ema.update(model)
        assert same(masks_of(model), masks_of(ema.module))
        assert ema.module.sparsity.step == step + 1


def test_a_copy_of_a_model_trains_sparse_too():
    model = copy.deepcopy(make_model())
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert model.sparsity.phase == RUNNING


def test_nothing_is_left_hanging_after_the_models_are_gone():
    gc.collect()
    before = len(follow._followers)
    model = make_model()
    copied = copy.deepcopy(model)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert len(follow._followers) == before + 2
    del model, copied
    gc.collect()
    assert len(follow._followers) == before
    if before == 0:
        assert not follow.is_following()


def test_fine_tuning_published_weights_keeps_their_masks(tmp_path):
    model = make_model()
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 3)
    timm.models.save_for_hf(model, tmp_path / 'published', safe_serialization=True)
    tuned = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True, num_classes=3, prune_interval=1)
    assert same(masks_of(model), masks_of(tuned))
    assert tuned.sparsity.phase == FIXED
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert same(masks_of(model), masks_of(tuned))


def test_fine_tuning_published_dense_weights_stays_dense(tmp_path):
    model = make_model(sparsity=0)
    timm.models.save_for_hf(model, tmp_path / 'published', safe_serialization=True)
    tuned = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True)
    train_steps(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1), 2)
    assert all(m.all() for m in masks_of(tuned))


def test_trained_weights_that_meet_a_new_optimizer_keep_their_masks(caplog):
    caplog.set_level(logging.INFO, logger='timm_shiftwise')
    model = make_model()
    train_steps(model, torch.optim.AdamW(model.parameters()), 3)
    tuned = make_model(prune_interval=1)
    tuned.load_state_dict(model.state_dict())
    train_steps(tuned, torch.optim.AdamW(tuned.parameters()), 3)
    assert same(masks_of(model), masks_of(tuned))
    assert tuned.sparsity.phase == FIXED
    assert sum('Fine-tuning keeps the masks' in r.getMessage() for r in caplog.records) == 1


@paths_alike_or_apart
def test_a_resumed_run_goes_on_with_its_schedule(sharing):
    torch.manual_seed(0)
    whole, resumed = (make_model(mask_sharing_interval=sharing) for _ in range(2))
    optimizer = torch.optim.AdamW(whole.parameters())
    train_steps(whole, optimizer, 3)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    new_optimizer = torch.optim.AdamW(resumed.parameters())
    new_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((whole, optimizer), (resumed, new_optimizer)):
        train_steps(model, opt, 5, seed=9)
    assert resumed.sparsity.step == 8
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


RUN = '''
import os, sys, torch, timm, timm_shiftwise
from safetensors.torch import save_file
folder, steps = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = timm.create_model('test_sw', num_classes=5, kernel_size=3, prune_interval=2, sparsity_steps=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
start, path = 0, os.path.join(folder, 'last.pth')
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved['state_dict'])
    optimizer.load_state_dict(saved['optimizer'])
    start = saved['step']
for step in range(start, steps):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    torch.save(dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1), path + '.new')
    os.replace(path + '.new', path)
    print('step', step + 1, flush=True)
save_file(model.state_dict(), os.path.join(folder, 'final.safetensors'))
'''


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    script = tmp_path / 'run.py'
    script.write_text(RUN)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    whole.mkdir()
    killed.mkdir()
    subprocess.run([sys.executable, script, whole, '12'], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, script, killed, '12'], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == 'step 5':
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / 'final.safetensors').exists()
    subprocess.run([sys.executable, script, killed, '12'], check=True, stdout=subprocess.DEVNULL)
    first, second = load_file(whole / 'final.safetensors'), load_file(killed / 'final.safetensors')
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert int(first['sparsity.step']) == 12


@pytest.mark.parametrize('bad', [
    dict(sparsity=1.2), dict(sparsity=1.), dict(sparsity=-0.1), dict(sparsity='much'), dict(sparsity=float('nan')),
    dict(prune_rate=1.5), dict(prune_rate=-1), dict(prune_interval=0), dict(prune_interval=2.5),
    dict(sparsity_init='magic'), dict(sparsity_steps=0), dict(sparsity_seed=-1), dict(mask_sharing_interval=0),
])
def test_bad_settings_are_named(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=name) as error:
        make_model(**bad)
    assert repr(value) in str(error.value)


def test_slak_has_nothing_to_prune():
    with pytest.raises(ValueError, match='sparsity'):
        timm.create_model('slak_tiny', sparsity=0.4, device='meta')


def test_a_mask_of_the_wrong_shape_is_refused():
    model = make_model()
    state = model.state_dict()
    state['stages.0.blocks.0.conv_dw.group_mask'] = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r'stages\.0\.blocks\.0\.conv_dw\.group_mask'):
        model.load_state_dict(state)
