"""Two ranks, gloo processes on this machine that share every batch, train as one process does.

Losses, masks and weights are compared in float64. PyTorch's SyncBatchNorm refuses to train on the CPU: here BatchNorms
use statistics with which one process does the very same. They are ``'running'`` ones, and one process sees the whole
batch at once; or each part's ``'own'`` ones, and one process sees the ranks' parts one after the other.
"""
import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import assert_all_close, each_family, image, make, merged, unsettle
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
STEPS = 6
BATCH = 8
WHOLE = StateDictOptions(full_state_dict=True)

# what takes long to import, once, in the process that the ranks are forked from
torch.multiprocessing.get_context('forkserver').set_forkserver_preload([
    'pytest', 'timm', 'torch.distributed.checkpoint.state_dict', 'torch.distributed.fsdp', 'torch._dynamo'])


class Run(NamedTuple):
    """What is trained.

    Attributes:
        family: See ``families``.
        sparse: Whether the default schedule prunes, or masks stay.
        statistics: Those that BatchNorms use, ``'running'`` or ``'own'``.
        chunks: Backward passes of each rank for an optimiser step.
        num_paths: Parallel kernels of an operator, the axis that is sharded.
    """
    family: str = 'sw'
    sparse: bool = True
    statistics: str = 'running'
    chunks: int = 1
    num_paths: int = 2

    def __str__(self) -> str:
        """What is not as by default, for the names of tests."""
        given = [f'{name}-{getattr(self, name)}' for name, value in self._field_defaults.items()
                 if getattr(self, name) != value]
        return '-'.join(given) or 'default'

    def network(self) -> nn.Module:
        """The network, the same in every call."""
        schedule = dict(prune_interval=2, sparsity_steps=20) if self.sparse else dict(sparsity=0)
        model = make(self.family, num_paths=self.num_paths, dtype=torch.float64, backend='torch', **schedule)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and self.statistics == 'running':
                module.eval()
        return model

    def parts(self, rank: int) -> list[Tensor]:
        """Images, by their places in the batch, of each backward pass of a rank."""
        return list(torch.arange(BATCH).chunk(RANKS)[rank].chunk(self.chunks))


class Result(NamedTuple):
    """What came of a run: a loss and all masks for each step, and what is left at the end."""
    losses: list[float]
    masks: list[Tensor]
    state: dict[str, Tensor]
    memory: list[Tensor]


def train(
        model: nn.Module,
        network: nn.Module,
        parts: list[Tensor],
        hold_back: Callable[[], AbstractContextManager] = nullcontext,
) -> Result:
    """Train on the given parts of every batch.

    Args:
        model: The network.
        network: The network, or what wraps it.
        parts: Images of each backward pass.
        hold_back: Keeps gradients from the other ranks for all but the last backward pass of a step.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    operators = model.sparsity.layers()
    losses, masks = [], []
    for step in range(STEPS):
        x = image(BATCH, 3, 32, 48, seed=step, dtype=torch.float64)
        target = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = 0.
        for part in parts:
            with nullcontext() if part is parts[-1] else hold_back():
                share = nn.functional.cross_entropy(network(x[part]), target[part]) / len(parts)
                share.backward()
            loss += share.item()
        optimizer.step()
        losses.append(loss)
        masks.append(torch.cat([operator.group_mask.flatten() for operator in operators]))
    state = get_model_state_dict(model, options=WHOLE)
    memory = [optimizer.state[operator.kernels]['exp_avg'] for operator in operators]
    memory = [part.full_tensor() if hasattr(part, 'full_tensor') else part for part in memory]
    return Result(losses, masks, state, memory)


def alone(run: Run) -> Result:
    """The run in one process."""
    model = run.network()
    at_once = [torch.arange(BATCH)]
    return train(model, model, at_once if run.statistics == 'running' else [*run.parts(0), *run.parts(1)])


def shard(model: nn.Module) -> nn.Module:
    """Let each rank hold a part of every parameter."""
    mesh = init_device_mesh('cpu', (RANKS,))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_replicated(rank: int, run: Run) -> Result:
    model = run.network()
    unsettle(model, seed=rank)  # ranks start apart: DDP sends the first one's weights to all
    network = DistributedDataParallel(model)
    return train(model, network, run.parts(rank), network.no_sync)


def train_sharded(rank: int, run: Run) -> Result:
    model = shard(run.network())

    @contextmanager
    def hold_back():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return train(model, model, run.parts(rank), hold_back)


def _rank(rank: int, folder: Path, function: Callable) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=(folder / 'meeting').as_uri(), rank=rank, world_size=RANKS)
    torch.save(function(rank), folder / f'{rank}.pt')
    distributed.destroy_process_group()


def on_every_rank(function: Callable, folder: Path) -> list:
    """What a function gives when each rank calls it, with its number."""
    torch.multiprocessing.start_processes(_rank, (folder, function), nprocs=RANKS, start_method='forkserver')
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(RANKS)]


def assert_equal_runs(ranks: list[Result], wanted: Result, run: Run) -> None:
    losses = torch.tensor([rank.losses for rank in ranks], dtype=torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)
    assert (losses[0] - losses[1]).abs().min() > 1e-3, 'the ranks saw the same data'
    close(losses.mean(0), torch.tensor(wanted.losses, dtype=torch.float64))
    assert (wanted.masks[0] != wanted.masks[-1]).any() == run.sparse
    for result in ranks:
        for seen, mask in zip(result.masks, wanted.masks, strict=True):
            assert torch.equal(seen, mask)
        assert_all_close(result.memory, wanted.memory, 1e-6, 1e-10)
        assert result.state.keys() == wanted.state.keys()
        for name, value in wanted.state.items():
            of_part = '.running_' in name or name.endswith('.num_batches_tracked')
            if run.statistics == 'running' or not of_part:
                close(result.state[name], value, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('run', [
    Run(),
    Run(statistics='own'),
    Run(sparse=False, statistics='own'),
    Run(chunks=2),
    Run('sw_v2', statistics='own', chunks=2),
    Run('sw_v2', sparse=False),
], ids=str)
def test_replicated_on_two_ranks_equals_one_process(run, tmp_path):
    ranks = on_every_rank(partial(train_replicated, run=run), tmp_path)
    assert_equal_runs(ranks, alone(run), run)
    means = [name for name in ranks[0].state if name.endswith('running_mean')]
    differ = [not torch.equal(*(result.state[name] for result in ranks)) for name in means]
    assert any(differ) == (run.statistics == 'own')


@pytest.mark.slow
@pytest.mark.parametrize('run', [
    Run(),
    Run(sparse=False, statistics='own'),
    Run(chunks=2),
    Run(num_paths=1),  # one rank's part is empty
    Run(num_paths=3),  # parts of two sizes
    Run('sw_v2', statistics='own'),
], ids=str)
def test_sharded_over_two_ranks_equals_one_process(run, tmp_path):
    ranks = on_every_rank(partial(train_sharded, run=run), tmp_path)
    assert_equal_runs(ranks, alone(run), run)


def load_sharded(rank: int) -> dict[str, Tensor]:
    model = shard(make('sw', backend='torch'))
    other = make('sw', backend='torch')
    unsettle(other, seed=1)
    set_model_state_dict(model, other.state_dict(), options=WHOLE)
    return get_model_state_dict(model, options=WHOLE)


@pytest.mark.slow
def test_a_sharded_network_takes_and_gives_whole_checkpoints(tmp_path):
    wanted = make('sw', backend='torch')
    unsettle(wanted, seed=1)
    for state in on_every_rank(load_sharded, tmp_path):
        seen = make('sw', backend='torch')
        seen.load_state_dict(state)
        for (name, a), b in zip(seen.state_dict().items(), wanted.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def step_flattened(use_orig_params: bool, **kwargs) -> None:
    network = FullyShardedDataParallel(
        make('sw', backend='torch', **kwargs), use_orig_params=use_orig_params, device_id=torch.device('cpu'))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(image(2, 3, 32, 48)).square().mean().backward()
    optimizer.step()


def train_flattened(rank: int, use_orig_params: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        step_flattened(use_orig_params, sparsity=0)
        assert not any('sparsity' in str(warning.message) for warning in told)
        step_flattened(use_orig_params)
    return [str(warning.message) for warning in told if 'sparsity' in str(warning.message)]


@pytest.mark.slow
@pytest.mark.parametrize('use_orig_params', [False, True])
def test_flattened_weights_are_left_alone_with_one_warning_and_a_way_on(use_orig_params, tmp_path):
    for messages in on_every_rank(partial(train_flattened, use_orig_params=use_orig_params), tmp_path):
        message, = messages
        assert 'stages.0.blocks.0.conv_dw.kernels' in message
        assert 'fully_shard' in message and 'sparsity=0' in message


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@each_family
def test_conversion_to_synchronised_statistics_changes_no_value(family, convert):
    plain = make(family, backend='torch')
    model = convert(copy.deepcopy(plain))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = image(2, 3, 32, 48)
    assert_all_close([model(x)], [plain(x)])
    assert_all_close([model.eval()(x)], [plain.eval()(x)])
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert_all_close([merged(model)(x), plain(x)], [plain(x), model(x)])
