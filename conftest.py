"""No unexplained skip: with CI set in the environment, a test may only be skipped for a reason listed here."""
import os
import sys

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:
    # one worker a core: a pool of threads in each, and in the processes that tests start, would only get in its way
    os.environ.setdefault('OMP_NUM_THREADS', '1')

ALLOWED_SKIPS = (
    'TIMM_SCRIPTS',  # timm's scripts come with a clone of timm, not with its wheel
    'setuptools',  # Python brings none since 3.12
    'CUDA',  # the machine has no NVIDIA GPU
    'chromium',  # the machine has no browser to open a page in
    'Triton',  # it comes with PyTorch's wheels for CUDA only
    *(['Taichi is not installed'] if sys.version_info >= (3, 14) else []),  # it has no wheels there
)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in CI that skipped a test for another reason."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or not os.environ.get('CI'):
        return
    reasons = {report.nodeid: str(report.longrepr) for report in reporter.stats.get('skipped', [])}
    unexplained = [node for node, reason in reasons.items() if not any(word in reason for word in ALLOWED_SKIPS)]
    if unexplained:
        reporter.section('skips without an allowed reason', red=True)
        reporter.write('\n'.join(unexplained) + '\n')
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
