"""Code in documents: what a README or a model card tells the reader to run."""
import re
import urllib.request
from pathlib import Path

import pytest
from PIL import Image


def code_blocks(text: str, language: str = 'python') -> list[str]:
    """The code blocks of a Markdown text that are in a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def serve_a_photo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer every request for a picture with one that is on the disk."""
    Image.new('RGB', (120, 80), 'orange').save(folder / 'picture.png')
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url: (folder / 'picture.png').open('rb'))
