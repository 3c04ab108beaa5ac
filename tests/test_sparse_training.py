"""The rules of sparse training, each in a case worked by hand; `docs/training.md` lists them by these tests' names."""
import pytest
import torch
from sparse_runs import make_model, masks_of, pruned_weights, same, train_steps

from timm_shiftwise.sparsity import masks


def draws(mask: torch.Tensor, magnitude: torch.Tensor, rate: float, shared: bool) -> list[torch.Tensor]:
    """New masks [P, C * K] of many steps."""
    return [
        masks.prune_and_regrow(mask, magnitude, rate, shared, seed=0, step=step, layer=1).flatten(1)
        for step in range(200)]


def test_one_threshold_over_the_kernels_of_all_paths():
    # two layers of two paths: of 12 kernels the 6 of largest saliency are kept, 9, 8, 7, 6, 5, 4
    saliencies = [torch.tensor([[9., 1., 8.]]), torch.tensor([[7., 0., 0.5]]),
                  torch.tensor([[6., 5., 4.]]), torch.tensor([[3., 2., 1.]])]
    # the last path would be left without any and gets one of the fullest, which is the third
    assert masks.snip_counts(saliencies, 0.5) == [2, 1, 2, 1]


def test_a_layer_of_99_percent_stays_dense():
    # 99 and 99 of 2 x 100, 98 and 100: 99 %; 97 and 100: less
    for counts in ([99, 99], [98, 100]):
        mask = masks.first_masks((2, 20, 5), counts, seed=0, layer=0)
        assert mask.all()
        for shared in (False, True):
            assert masks.prune_and_regrow(mask, torch.rand(2, 20, 5), 0.5, shared, seed=0, step=4, layer=0).all()
    assert masks.first_masks((2, 20, 5), [97, 100], seed=0, layer=0).sum((1, 2)).tolist() == [97, 100]


def test_each_path_removes_its_smallest_and_grows_as_many():
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[0, 1, 0], [0, 0, 0]]]).bool()
    magnitude = torch.tensor([[[5., 1., 2.], [3., 0., 0.]], [[0., 7., 0.], [0., 0., 0.]]])
    new = draws(mask, magnitude, 0.3, shared=False)
    # of the first path's four ceil(0.3 * 4) = 2 go, those of 1 and 2; two of the other four places grow: 6 pairs
    assert all(m[0].sum() == 4 and m[0, 0] and m[0, 3] for m in new)
    assert len({tuple(m[0].tolist()) for m in new}) == 6
    # the second path's only one goes, and comes back if it is drawn
    assert {tuple(m[1].tolist()) for m in new} == {tuple(row.tolist()) for row in torch.eye(6).bool()}


def test_a_kept_group_of_zeros_is_removed_before_others_but_stays_behind_no_pruned_one():
    mask = torch.tensor([[[0, 0, 1, 1, 1]]]).bool()
    # ceil(0.3 * 3) = 1 goes: the one of zeros, though the pruned ones, which come first, are zero, too
    for shared in (False, True):
        new = draws(mask, torch.tensor([[[0., 0., 0., 2., 3.]]]), 0.3, shared)
        assert all(m[0, 3] and m[0, 4] and m.sum() == 3 for m in new)


def test_a_shared_exchange_follows_the_sums_and_the_first_path():
    mask = torch.tensor([[[1, 1, 1, 0, 0, 0]], [[1, 0, 0, 1, 1, 0]]]).bool()
    magnitude = torch.tensor([[[5., 1., 2., 0., 0., 0.]], [[.5, 0., 0., 9., 3., 0.]]])
    new = draws(mask, magnitude, 0.3, shared=True)
    # sums 5.5, 1, 2, 9, 3, none; the first path has 3 pruned and removes ceil(0.3 * 3) = 1: the 4 smallest sums are
    # cut, places 5, 1, 2, 4; of the first path's groups place 0 is left, and two of the five others are drawn
    assert all(m[:, 0].all() and torch.equal(m[0], m[1]) and m[0].sum() == 3 for m in new)
    assert len({tuple(m[0].tolist()) for m in new}) == 10


def test_paths_start_apart_and_share_masks_at_every_interval():
    model = make_model(prune_interval=2, mask_sharing_interval=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts, before = None, None
    for step in range(1, 9):
        train_steps(model, optimizer, 1, seed=step)
        now = masks_of(model)
        # exchanges after steps 2, 4, 6, 8; the third is shared
        assert all(torch.equal(*mask) for mask in now) == (step in (6, 7))
        assert before is None or same(before, now) == (step % 2 == 1)
        paths = [[int(path.sum()) for path in mask] for mask in now]
        assert counts is None or paths == (counts if step < 6 else [[count[0]] * 2 for count in counts])
        counts, before = counts or paths, now


@pytest.mark.parametrize('sharing', [1, 100])
def test_a_group_removed_and_drawn_again_keeps_all(sharing):
    settings = dict(prune_rate=1., sparsity_steps=10 ** 9, mask_sharing_interval=sharing, sparsity_init='uniform')
    torch.manual_seed(0)
    model, plain = make_model(prune_interval=3, **settings), make_model(prune_interval=100, **settings)
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(network.parameters()) for network in (model, plain)]
    for network, optimizer in zip((model, plain), optimizers, strict=True):
        train_steps(network, optimizer, 3)
    # all groups were removed, and as many drawn: of them those that were kept before are as without an exchange
    for layer, other in zip(model.sparsity.layers(), plain.sparsity.layers(), strict=True):
        keep = (layer.group_mask & other.group_mask)[..., None, None]
        assert keep.any() and not keep.all()
        assert torch.equal(layer.kernels, other.kernels * keep)
        for key in ('exp_avg', 'exp_avg_sq'):
            state, before = (optimizer.state[at.kernels][key] for optimizer, at in zip(
                optimizers, (layer, other), strict=True))
            assert torch.equal(state * keep, before * keep), key
            assert state[pruned_weights(layer)].eq(0).all(), key
