"""Where published weights are looked for, and what to say where they cannot be had.

`timm.create_model(name, pretrained=True)` fetches weights through timm's builder and huggingface_hub. What goes wrong
there ends in an error of theirs or of the file format's, which seldom names the repository and never a way on.
"""
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg, load_state_dict, resolve_pretrained_cfg

AUTHORS_TAG = 'authors_in1k'
"""Tag of the papers' authors' weights."""

LICENSE_OF_THE_AUTHORS = 'other'
"""What is said of the licence of the papers' authors' weights, which is theirs to state where they publish them."""

ORGANISATION_VARIABLE = 'TIMM_SHIFTWISE_ORG'
"""Environment variable that names an organisation of the Hub with weights; read when the package is imported."""

_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
_HTTP_LIBRARIES = ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')


class PretrainedWeightsError(RuntimeError):
    """Weights asked for with ``pretrained=True`` could not be had: the message says from where, and what happened."""


class WeightsNotPublishedError(PretrainedWeightsError):
    """Nobody has published weights under a registered name: the message says the ways on."""


def hub_id(name: str) -> str | None:
    """Repository id on the Hub of a model name with its tag; None where nobody says who publishes its weights."""
    organisation = os.environ.get(ORGANISATION_VARIABLE)
    return f'{organisation}/{name}' if organisation else None


@contextmanager
def explain_missing_weights(variant: str, pretrained: bool, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn a failure to get a model's weights, raised in the body, into an error that says what to do.

    A file in the cache that cannot be read is removed from it, so that the next call fetches it anew.

    Args:
        variant: Name of the model, without a tag.
        pretrained: Whether weights are asked for; if not, every error passes.
        arguments: Keyword arguments of ``build_model_with_cfg``, of which those that tell the source are read.

    Raises:
        WeightsNotPublishedError: If no weights are published under a registered name.
        PretrainedWeightsError: If weights could not be fetched or read for another reason. Weights that do not fit the
            model are another matter, and their error passes.
    """
    try:
        yield
    except Exception as error:
        explained = None
        if pretrained:
            cfg = resolve_pretrained_cfg(
                variant, arguments.get('pretrained_cfg'), arguments.get('pretrained_cfg_overlay'))
            explained = _explain(error, variant, cfg, arguments.get('cache_dir'))
        if explained is None:
            raise
        raise explained from error


def _explain(
        error: Exception, variant: str, cfg: PretrainedCfg,
        cache_dir: str | Path | None) -> PretrainedWeightsError | None:
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if not (cfg.file or cfg.hf_hub_id or cfg.url or cfg.state_dict):
        return WeightsNotPublishedError(
            f'No weights are published under the name {name} yet.\n{_ways_on(variant, cfg)}')
    if cfg.source == 'local-dir' or (cfg.file and cfg.source != 'hf-hub'):
        return _explain_file(error, Path(cfg.file or ''))
    if cfg.hf_hub_id:
        return _explain_hub(error, variant, name, cfg, cache_dir)
    return None


def _explain_file(error: Exception, path: Path) -> PretrainedWeightsError | None:
    if isinstance(error, FileNotFoundError):
        return PretrainedWeightsError(f'The weights were looked for at {path}, where there is no file.')
    file = path
    if path.is_dir():
        file = next((path / weights for weights in _WEIGHTS if (path / weights).exists()), path)
    reason = _unreadable(file) if file.is_file() else None
    return PretrainedWeightsError(f'The weights in {file} cannot be read: {reason}') if reason else None


def _explain_hub(
        error: Exception, variant: str, name: str, cfg: PretrainedCfg,
        cache_dir: str | Path | None) -> PretrainedWeightsError | None:
    repo_id, _, revision = str(cfg.hf_hub_id).partition('@')
    weights = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _WEIGHTS
    registered = cfg.source != 'hf-hub' and repo_id.endswith(f'/{name}')
    what = f'the repository {repo_id}' + (f' at revision {revision}' if revision else '') + f' on {constants.ENDPOINT}'
    organisation = os.environ.get(ORGANISATION_VARIABLE)
    if organisation and registered:
        what += f' (the environment variable {ORGANISATION_VARIABLE} is set to {organisation!r})'
    causes = _causes(error)

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if first(HFValidationError):
        return PretrainedWeightsError(
            f'The weights of {name} cannot be looked for: {repo_id!r} is not the name of a repository. '
            f'{sentence(error)} {ORGANISATION_VARIABLE} takes the name of an organisation or user of the Hub.')
    if first(GatedRepoError):
        return PretrainedWeightsError(
            f'The weights of {name} are in {what}, which is gated: ask for access on its page, then log in with '
            f'`hf auth login` or set HF_TOKEN.')
    if first(RepositoryNotFoundError):
        where = f'{what[0].upper()}{what[1:]} does not exist, or is private and no token that opens it was sent.'
        if not registered:
            return PretrainedWeightsError(where)
        return WeightsNotPublishedError(
            f'No weights are published under the name {name} yet. {where}\n{_ways_on(variant, cfg)}')
    if first(RevisionNotFoundError):
        return PretrainedWeightsError(f'The repository {repo_id} on {constants.ENDPOINT} has no revision {revision!r}.')
    if first(OfflineModeIsEnabled):
        return PretrainedWeightsError(
            f'The weights of {name} are not in the cache ({cache_dir or constants.HF_HUB_CACHE}), and the offline mode '
            f'(HF_HUB_OFFLINE) forbids to fetch them from {what}. Unset HF_HUB_OFFLINE and run once with a connection.')
    missing = first(EntryNotFoundError)
    if missing is not None and not isinstance(missing, LocalEntryNotFoundError):
        return PretrainedWeightsError(
            f'There are no weights of {name} in {what}: it has no file {" or ".join(weights)}.'
            + (f'\n{_ways_on(variant, cfg)}' if registered else ''))
    failed = f'The weights of {name} could not be fetched from {what}: '
    # before huggingface_hub 1.0 a file missing from the cache was an answer of the server's, too
    causes = [cause for cause in causes if not isinstance(cause, LocalEntryNotFoundError)]
    answer = first(HfHubHTTPError)
    if isinstance(answer, HfHubHTTPError):
        refused = answer.response is not None and answer.response.status_code in (401, 403)
        advice = 'Check the token (`hf auth whoami`, HF_TOKEN).' if refused else 'Try again later.'
        return PretrainedWeightsError(f'{failed}{sentence(answer)} {advice}')
    transport = next((cause for cause in causes if is_transport_error(cause)), None)
    if transport is not None:
        return PretrainedWeightsError(
            f'{failed}the server was not reached, or the connection was cut ({type(transport).__name__}: '
            f'{transport}). Try again.')
    for file in weights:
        cached = try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision or None)
        if isinstance(cached, str) and (reason := _unreadable(Path(cached))):
            _forget(Path(cached))
            return PretrainedWeightsError(
                f'The file {file} from {what} cannot be read, and was removed from the cache: {reason}')
    if isinstance(error, OSError):
        return PretrainedWeightsError(f'{failed}{sentence(error)}')
    return None


def _ways_on(variant: str, cfg: PretrainedCfg) -> str:
    published = f' The authors publish at {cfg.origin_url}' if cfg.origin_url else ''
    if published:
        published += ': one checkpoint, that of sw_v2_tiny.' if 'slak' not in variant else '.'
    size = variant.rpartition('_')[2]
    grown = f'sw_convnext_{size}' if size in ('tiny', 'small', 'base', 'large') else 'sw_convnext_tiny'
    return (
        'Four ways on:\n'
        f"  - Start from a ConvNeXt: timm.create_model('{grown}', pretrained=True) has its weights, computes the same "
        'and can learn a larger reach as it is fine-tuned.\n'
        f'  - Train the network: timm-shiftwise recipe {variant} --data-dir IMAGENET, then python train.py --config '
        f'{variant}.yaml.\n'
        f"  - Convert the authors' checkpoint: timm-shiftwise convert FILE.pth --model {variant} --output FOLDER, "
        f"then timm.create_model('local-dir:FOLDER', pretrained=True).{published}\n"
        f'  - Take weights from elsewhere: set {ORGANISATION_VARIABLE} to another organisation of the Hub before '
        "Python starts, or name a repository or a folder: timm.create_model('hf-hub:USER/NAME', pretrained=True), "
        "timm.create_model('local-dir:FOLDER', pretrained=True)."
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and what it came from, the latest first."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes


def is_transport_error(error: BaseException) -> bool:
    """Whether an error says that a server was not reached, or a connection cut."""
    # huggingface_hub has changed its HTTP library twice, and lets the library's errors pass
    return isinstance(error, ConnectionError) or type(error).__module__.split('.')[0] in _HTTP_LIBRARIES


def sentence(error: BaseException) -> str:
    """The first line of an error's message that says something, with a full stop."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(('.', '!', '?')) else f'{line}.'


def _unreadable(path: Path) -> str | None:
    """Why a file of weights cannot be read; None if it can."""
    try:
        load_state_dict(str(path), weights_only=True)
    except Exception as error:  # noqa: BLE001 (whatever a broken file raises is the answer)
        if path.suffix == '.safetensors':
            return f'it is cut short or no safetensors file ({sentence(error)})'
        return f'it is cut short, or a pickle that asks for more than tensors, which is never run ({sentence(error)})'
    return None


def _forget(pointer: Path) -> None:
    """Remove a file from huggingface_hub's cache: what its snapshot points to, and the pointer."""
    pointer.resolve().unlink(missing_ok=True)
    pointer.unlink(missing_ok=True)
