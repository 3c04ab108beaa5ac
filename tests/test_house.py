"""The shape of the package: imports point downwards, the library does not print, and everything public is described."""
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_shiftwise

PACKAGE = 'timm_shiftwise'
ROOT = Path(timm_shiftwise.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))

# from the bottom to the top; '' is the package itself
ROOMS = (
    'geometry', 'ops', 'layers', 'sparsity', 'models', 'receptive_field', '', 'profile', 'hub', 'history', 'recipes',
    'quickstart', 'environment', 'cli', '__main__',
)
MAY_PRINT = ('cli', '__main__')

each_file = pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))


def room_of(path: Path) -> str:
    """The room that a file lies in."""
    first = path.relative_to(ROOT).parts[0].removesuffix('.py')
    return '' if first == '__init__' else first


def imported_rooms(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package's own modules, those inside functions too."""
    package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            base += node.module.split('.') if node.module else []
            # `from timm_shiftwise import ops` names a room where `from timm_shiftwise import __version__` does not
            targets = [[*base, alias.name] if alias.name in ROOMS else base for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == PACKAGE:
                yield node.lineno, target[1] if len(target) > 1 else ''


def upward_imports(source: str, path: Path) -> list[str]:
    """Imports of a room above the file's own."""
    own = ROOMS.index(room_of(path))
    return [
        f'line {line}: {room or PACKAGE}' for line, room in imported_rooms(source, path) if ROOMS.index(room) > own]


def prints(source: str) -> list[int]:
    """Lines that call print."""
    return [
        node.lineno for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'print']


def undescribed(source: str) -> list[str]:
    """Public classes, functions and methods without a docstring, and the module itself."""
    def missing(node: ast.AST, name: str) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield name
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith('_'):
                if isinstance(child, ast.ClassDef):
                    yield from missing(child, f'{name}.{child.name}')
                elif ast.get_docstring(child) is None:
                    yield f'{name}.{child.name}'
    return list(missing(ast.parse(source), 'module'))


def test_every_file_belongs_to_a_room():
    assert {room_of(path) for path in FILES} <= set(ROOMS)


@each_file
def test_imports_point_downwards(path):
    assert upward_imports(path.read_text(), path) == []


@each_file
def test_the_library_does_not_print(path):
    if room_of(path) not in MAY_PRINT:
        assert prints(path.read_text()) == []


@each_file
def test_everything_public_is_described(path):
    assert undescribed(path.read_text()) == []


def test_the_order_of_channels_is_put_right_in_one_file():
    knowing = {str(path.relative_to(ROOT)) for path in FILES if re.search(r'\bstream_order\b', path.read_text())}
    assert knowing == {'layers/wiring.py', 'models/layouts.py'}


@pytest.mark.parametrize('source', [
    'from timm_shiftwise.layers import ShiftwiseConv2d',
    'from timm_shiftwise import layers',
    'import timm_shiftwise.layers.wiring',
    'from ...layers.wiring import make_wiring',
    'def f():\n    from ... import layers',
    'from timm_shiftwise import __version__',
])
def test_an_import_that_points_upwards_is_seen(source):
    assert upward_imports(source, ROOT / 'ops' / 'shift_add' / 'frontend.py')


@pytest.mark.parametrize('source', [
    'from timm_shiftwise.geometry import crop',
    'from .torch_impl import shift_add_torch',
    'from ..backend import choose_backend',
    'import torch',
])
def test_an_import_that_points_downwards_or_out_is_allowed(source):
    assert upward_imports(source, ROOT / 'ops' / 'shift_add' / 'frontend.py') == []


def test_what_is_printed_or_undescribed_is_seen():
    assert prints('def f():\n    print(1)') == [2]
    assert undescribed('"""m"""\nclass A:\n    """a"""\n    def f(self): ...\n    def _g(self): ...') == ['module.A.f']
    assert undescribed('def f(): ...') == ['module', 'module.f']
