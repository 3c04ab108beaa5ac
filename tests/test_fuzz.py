"""Calls drawn at random, and that the drawing would notice what it looks for."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.fuzz import __main__ as runner
from tests.fuzz.calls import DTYPES, OPERATORS, Drawn, draw_setting, make_call
