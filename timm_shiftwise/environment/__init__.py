"""The Python environment that the package lies in: known to timm without an import, and described."""
from .enabled import SiteError, disable, enable, is_enabled

__all__ = ['SiteError', 'disable', 'enable', 'is_enabled']
