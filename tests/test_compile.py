"""torch.compile: one graph for every size of batch and image, and for every mask, with the results of eager mode."""
import copy
import itertools

import pytest
import torch
from families import (
    FAMILIES,
    WAYS_ON_CPUS,
    assert_all_close,
    each_family,
    image,
    make,
    merged,
    registered_families,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from timm_shiftwise.ops.shiftwise_conv import ways

SIZES = [(2, 32, 48), (3, 32, 48), (3, 56, 40), (4, 40, 40)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Let no test see what another compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dynamic(x: Tensor, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """Mark batch, height and width: a graph that holds for one value of these only is then an error."""
    for axis in axes:
        torch._dynamo.mark_dynamic(x, axis)
    return x


def train_step(run, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits, then the gradients of every parameter and the BatchNorms' statistics afterwards."""
    model.zero_grad()
    logits = run(x)
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    return [logits.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def test_every_registered_family_is_tested():
    assert registered_families() == set(FAMILIES)


@each_family
def test_training_is_one_graph_that_equals_eager(family):
    model = make(family, backend='torch')
    twin = copy.deepcopy(model)
    backend = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size in SIZES:
        x = image(size[0], 3, *size[1:])
        assert_all_close(train_step(compiled, model, dynamic(x.clone())), train_step(twin, twin, x))
    assert backend.frame_count == 1


@pytest.mark.parametrize('form', ['unmerged', 'merged'])
@each_family
def test_inference_is_one_graph_that_equals_eager(family, form):
    model = make(family, backend='torch').eval()
    model = merged(model) if form == 'merged' else model
    backend = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for size in SIZES:
            x = image(size[0], 3, *size[1:])
            torch.testing.assert_close(compiled(dynamic(x.clone())), model(x), rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


@pytest.mark.parametrize('way', WAYS_ON_CPUS)
def test_every_way_is_one_graph(way, monkeypatch, request):
    if ways.WAYS[way].backends == ('taichi',):
        request.getfixturevalue('needs_taichi')
    monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, way)
    model = make('sw', kernel_size=3)
    twin = copy.deepcopy(model)
    backend = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size in SIZES[1:3]:
        x = image(size[0], 3, *size[1:])
        assert_all_close(train_step(compiled, model, dynamic(x.clone())), train_step(twin, twin, x))
    assert backend.frame_count == 1


def test_by_default_sizes_stop_recompiling_once_all_have_changed():
    model = make('sw')
    backend = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counts = []
    for size in [(2, 32, 48), (3, 32, 48), (3, 56, 40), (4, 40, 64), (5, 64, 48), (2, 48, 40)]:
        compiled(image(size[0], 3, *size[1:]))
        counts.append(backend.frame_count)
    assert counts[2:] == [counts[2]] * 4


def test_nothing_recompiles_while_masks_change():
    model = make('sw', sparsity=0.4, prune_interval=1, prune_rate=0.5, sparsity_steps=100, dtype=torch.float64)
    twin = copy.deepcopy(model)
    backend, backend_optimizer = CompileCounterWithBackend('aot_eager'), CompileCounterWithBackend('eager')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    # not AdamW, of which PyTorch counts the steps in float32 once it is compiled
    optimizer, optimizer_twin = (torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, twin))
    step = torch.compile(optimizer.step, backend=backend_optimizer)
    masks, counts = [], []
    for k in range(5):
        x = image(4, 3, 32, 48, seed=k, dtype=torch.float64)
        assert_all_close(train_step(compiled, model, x), train_step(twin, twin, x), 1e-3, 1e-4)
        step()
        optimizer_twin.step()
        masks.append(torch.cat([layer.group_mask.flatten() for layer in model.sparsity.layers()]).clone())
        assert masks[-1].equal(torch.cat([layer.group_mask.flatten() for layer in twin.sparsity.layers()]))
        counts.append(backend_optimizer.frame_count)
    assert all((a != b).any() for a, b in itertools.pairwise(masks))
    assert backend.frame_count == 1
    assert counts[1:] == [counts[1]] * 4


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_inside_the_graph(dtype):
    model = make('sw', kernel_size=3)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = image(3, 3, 32, 48)
    with torch.autocast('cpu', dtype):
        seen, wanted = train_step(compiled, model, x), train_step(twin, twin, x)
    assert seen[0].dtype == wanted[0].dtype == dtype
    truth = train_step(exact, exact, x.double())
    off, twin_off = (  # by tensor, as a share of what double precision gives
        [(a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9) for a, b in zip(step, truth, strict=True)]
        for step in (seen, wanted))
    # the graph may round elsewhere, but loses no more of what matters
    assert sum(off) < 1.2 * sum(twin_off) and max(off) < 1.2 * max(twin_off)


@pytest.mark.slow
def test_inductor_trains_with_any_batch():
    # images of changing size are too much for Inductor of torch 2.14, with timm's convnext too: pytorch/pytorch#185510
    model = make('sw')
    twin = copy.deepcopy(model)
    backend = CompileCounterWithBackend('inductor')
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 5):
        x = image(batch, 3, 32, 48)
        assert_all_close(train_step(compiled, model, dynamic(x.clone(), (0,))), train_step(twin, twin, x), 1e-3, 1e-4)
    assert backend.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize('family', ['sw', 'p2_sw'])
def test_inductor_infers(family):
    model = merged(make(family))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for size in SIZES[:3]:
            x = image(size[0], 3, *size[1:])
            torch.testing.assert_close(compiled(dynamic(x.clone())), model(x), rtol=1e-4, atol=1e-4)
