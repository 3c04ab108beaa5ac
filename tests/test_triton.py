"""The Triton kernels without a GPU: what they compute in the interpreter, and what they compile to."""
import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> None:
    """Run Python on a file of this clone, with errors shown."""
    if find_spec('triton') is None:
        pytest.skip("Triton comes with PyTorch's wheels for CUDA only")
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **environment}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_in_the_interpreter_they_equal_the_definition():
    run('-m', 'pytest', 'tests/interpreted_triton.py', '-n', '0', '-p', 'no:cacheprovider', TRITON_INTERPRET='1')


def assert_sound(path: Path) -> list[dict[str, str]]:
    """Rows of a table of compiled kernels: none spills registers, and all have instructions for matrix products."""
    with path.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row['spills'] == row['spilled_bytes'] == '0' and int(row['registers']) < 255
        assert set(row['matrix'].split('/')) <= {'80': {'HMMA'}, '90': {'HMMA', 'HGMMA'}}[row['capability']]
        assert int(row['matrix_instructions']) > 0 and int(row['shared_bytes']) < 48 * 1024
    return rows


@pytest.mark.slow
def test_compiled_ahead_of_time_they_do_not_spill_and_multiply_matrices(tmp_path):
    run('benchmarks/triton_ahead_of_time.py', '--quick', '--output', str(tmp_path / 'triton'),
        TRITON_CACHE_DIR=str(tmp_path / 'cache'))
    rows = assert_sound(tmp_path / 'triton.csv')
    kernels = {'forward', 'input gradient', 'products, wide', 'products, tall'}
    assert {(row['map'], row['kernel'], row['capability']) for row in rows} == {
        (shown, kernel, capability)
        for shown in ('stage 1', 'not square') for kernel in kernels for capability in ('80', '90')}


def test_the_table_of_results_is_of_every_stage_dtype_and_capability():
    rows = assert_sound(ROOT / 'benchmarks' / 'results' / 'triton.csv')
    maps = 'stage 1', 'stage 2', 'stage 3', 'stage 4', 'not square'
    assert {(row['map'], row['dtype'], row['capability']) for row in rows} == {
        (shown, dtype, capability)
        for shown in maps for dtype in ('bfloat16', 'float16') for capability in ('80', '90')}
