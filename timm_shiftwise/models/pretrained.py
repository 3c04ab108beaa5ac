"""Where published weights are looked for, and what to say where there are none."""
import os
from collections.abc import Iterator
from contextlib import contextmanager

ORGANISATION = 'timm-shiftwise'
"""Organisation on the Hugging Face Hub under which weights are looked for."""

ORGANISATION_VARIABLE = 'TIMM_SHIFTWISE_ORG'
"""Environment variable that names another organisation."""


def hub_id(name: str) -> str:
    """Repository id on the Hub of a model name with its tag."""
    return f'{os.environ.get(ORGANISATION_VARIABLE) or ORGANISATION}/{name}'


@contextmanager
def explain_missing_weights(variant: str) -> Iterator[None]:
    """Turn a failed look-up of a model's weights into an error that says the ways on."""
    yield
