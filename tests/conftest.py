"""What the tests share: the backends, and fresh memory that shows when it was not written."""
import pytest
import torch

from timm_shiftwise.ops.backend import explain_backend


@pytest.fixture
def needs_taichi() -> None:
    """Skip a test where Taichi cannot run."""
    choice = explain_backend('auto', torch.device('cpu'))
    if choice.backend != 'taichi':
        pytest.skip(f'Taichi cannot run here: {choice.reason}')


@pytest.fixture(params=['torch', 'taichi'])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation of an operator that can run here."""
    if request.param == 'taichi':
        request.getfixturevalue('needs_taichi')
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    """Run a test with so many threads of PyTorch's."""
    was = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(was)


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised tensors with NaN, so that an element which is never written fails the comparison."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_on)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled
