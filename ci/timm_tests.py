"""Run timm's own tests/test_models.py on the models of this package.

    python ci/timm_tests.py [options of pytest]

The test file is taken unchanged from the source distribution of the timm version that is installed. Its environment
variable TORCH_BACKEND makes it import this package before it lists timm's models. This file is also the pytest plugin
that keeps the tests of our models, in each of the processes that share them.
"""
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = 'timm_shiftwise'

ONCE_PER_MODEL = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
"""Tests that timm runs on every convolutional network: each of our models must meet each of them."""

NEEDS_WEIGHTS = {'test_model_load_pretrained', 'test_model_features_pretrained'}
"""Tests that load the weights; timm's CI leaves them out, we run them where the weights lie inside the package."""

NEEDS_TIMM_ORGANISATION = {'test_model_inference'}
"""Compares with tensors that timm publishes beside its own weights, in its own organisation on the Hub."""


class Outcomes:
    """Pytest plugin that counts what becomes of the tests, whichever process runs them."""

    def __init__(self) -> None:
        self.run: Counter[str] = Counter()
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test by its name without parameters, and remember skips."""
        if report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == 'call':
            self.run[report.nodeid.split('::')[-1].split('[')[0]] += 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests whose parameter model_name is one of ours; each process that collects loads this file for it."""
    models = our_models()
    ours = [item for item in items if _is_ours(item, models)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def _is_ours(item: pytest.Item, models: set[str]) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, 'callspec'):
        return False
    name = str(item.callspec.params.get('model_name'))
    if name.split('.')[0] not in models or item.originalname in NEEDS_TIMM_ORGANISATION:
        return False
    return item.originalname not in NEEDS_WEIGHTS or has_packaged_weights(name)


def our_models() -> set[str]:
    """Names in timm's registry whose entrypoint is in this package."""
    import timm
    return {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f'{PACKAGE}.')}


def has_packaged_weights(name: str) -> bool:
    """Whether the weights of a model are a file that the package carries."""
    import timm
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and cfg.file is not None and Path(cfg.file).is_file()


def fetch_tests(folder: Path) -> None:
    """Put timm's tests and its pytest settings, but not its package, into a folder."""
    version = importlib.metadata.version('timm')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
         '--dest', str(folder), f'timm=={version}'],
        check=True,
    )
    root = f'timm-{version}'
    with tarfile.open(folder / f'{root}.tar.gz') as archive:
        for member in archive.getmembers():
            inside = member.name.removeprefix(f'{root}/')
            if member.isfile() and (inside.startswith('tests/') or inside == 'pyproject.toml'):
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


def main(arguments: list[str]) -> int:
    """Fetch the tests, run them, and return pytest's exit status, 1 if a test was skipped or missing."""
    os.environ['TORCH_BACKEND'] = PACKAGE
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # one process a core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch_tests(folder)
        os.chdir(folder)
        outcomes = Outcomes()
        plugin = Path(__file__).stem
        status = int(pytest.main(
            ['tests/test_models.py', '-p', plugin, '-n', 'auto', '-rs', '--no-header', *arguments],
            plugins=[outcomes]))
        os.chdir('/')
        models = our_models()
    missing = sorted(test for test in ONCE_PER_MODEL if outcomes.run[test] < len(models))
    if missing:
        print(f'Not every model met {", ".join(missing)}.')
    if outcomes.skipped:
        print(f'Skipped: {", ".join(outcomes.skipped)}.')
    return status or int(bool(missing or outcomes.skipped))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
