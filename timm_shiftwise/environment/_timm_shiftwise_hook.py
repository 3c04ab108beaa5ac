"""Import timm_shiftwise whenever timm has been imported. `timm-shiftwise enable` copies this file into site-packages.

It runs at every start of the interpreter, so it imports nothing that is not there already, and never raises.
"""
import sys


class _Finder:
    """Finds timm as the other finders do, and lets its loader import timm_shiftwise at the end."""

    def find_spec(self, name, path=None, target=None):
        """Specification of timm; None for every other module."""
        if name != 'timm':
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            spec = find_spec(name, path, target) if find_spec and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):
                    _register_after(spec.loader)
                return spec
        return None


def _register_after(loader):
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        try:
            import timm_shiftwise  # noqa: F401
        except Exception as error:  # noqa: BLE001 (a program that only wants timm must go on)
            import warnings
            warnings.warn(
                f'timm_shiftwise, which `timm-shiftwise enable` lets timm know, cannot be imported: {error!r}. '
                '`timm-shiftwise disable` ends this.', stacklevel=2)

    loader.exec_module = exec_module


sys.meta_path.insert(0, _Finder())
