"""From a Hub folder to a repository on the Hub, in one commit."""
import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.models.pretrained import is_transport_error, sentence

from .errors import HubError
from .model_card import config_of, refer_to

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'
_EXTRAS = re.compile(r'(LICEN[CS]E|NOTICE|CITATION)(\..*)?|.*\.(md|txt|png|jpe?g|svg|webp|gif)', re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What would be sent where.

    Attributes:
        folder: The Hub folder.
        repo_id: The repository, ``user/name``.
        endpoint: Address of the Hub.
        revision: Branch to commit to; it is made if there is none.
        private: Whether the repository must be private.
        create_pr: Whether to open a pull request instead of a commit.
        files: Size in bytes of each file that is sent, by its name.
        left_out: Why each other file of the folder is not sent, by its name.
        card: The model card as it is sent.
        architecture: Name of the network.
    """
    folder: Path
    repo_id: str
    endpoint: str
    revision: str
    private: bool
    create_pr: bool
    files: dict[str, int]
    left_out: dict[str, str]
    card: str
    architecture: str


def plan(
        folder: str | Path, repo_id: str, *, revision: str | None = None, private: bool = False,
        create_pr: bool = False) -> Plan:
    """Check a Hub folder and say what :func:`publish` would send; asks nothing of the network.

    Args:
        folder: The folder: model.safetensors, config.json, README.md, and pictures or texts beside them.
        repo_id: The repository, ``user/name``.
        revision: Branch to commit to; None for the main one.
        private: Make the repository private, and refuse one that is not.
        create_pr: Open a pull request instead.

    Raises:
        HubError: If the folder is not whole, its weights do not load, or a name is none that the Hub takes.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise HubError(f'A pull request is opened against the main branch: leave out the revision {revision!r}.')
    revision = revision or constants.DEFAULT_REVISION
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._/-]*', revision) or '..' in revision or '//' in revision:
        raise HubError(f'{revision!r} is no name of a branch.')
    files, left_out = _list_files(folder)
    card = _read_card(folder)
    architecture = _check_loads(folder)
    card = refer_to(card, repo_id)
    files[CARD] = len(card.encode())
    return Plan(folder, repo_id, constants.ENDPOINT, revision, private, create_pr, files, left_out, card, architecture)


def publish(planned: Plan) -> str:
    """Send a folder to the Hub in one commit: either all of it arrives, or nothing changes.

    Args:
        planned: What :func:`plan` returned.

    Returns:
        Address of the commit or the pull request.

    Raises:
        HubError: If there is no token, or the Hub refuses or cannot be reached; the message says what to do.
    """
    token = get_token()
    if not token:
        raise HubError(
            'There is no token to publish with: make one that may write at '
            f'{planned.endpoint}/settings/tokens, then run `hf auth login` or set HF_TOKEN.')
    api = HfApi(endpoint=planned.endpoint, token=token, library_name='timm-shiftwise')
    operations = [
        CommitOperationAdd(name, planned.card.encode() if name == CARD else str(planned.folder / name))
        for name in planned.files
    ]
    try:
        api.create_repo(planned.repo_id, private=planned.private or None, exist_ok=True)
        if planned.private and not api.model_info(planned.repo_id).private:
            raise HubError(
                f'The repository {planned.repo_id} is there already and is public, nothing was sent to it. Make it '
                f'private on its settings page, or take another name.')
        if planned.revision != constants.DEFAULT_REVISION:
            api.create_branch(planned.repo_id, branch=planned.revision, exist_ok=True)
        commit = api.create_commit(
            planned.repo_id,
            operations,
            commit_message=f'Add {planned.architecture}',
            revision=planned.revision,
            create_pr=planned.create_pr,
        )
    except HubError:
        raise
    except Exception as error:
        explained = _explain(error, planned)
        if explained is None:
            raise
        raise explained from error
    return str(commit.pr_url or commit.commit_url)


def _explain(error: BaseException, planned: Plan) -> HubError | None:
    where = f'{planned.repo_id} on {planned.endpoint}'
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError) and not is_transport_error(cause):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            advice = 'The token is not valid, or may not write: check it with `hf auth whoami`.'
        elif status == 403:
            advice = f'The token may not write to {planned.repo_id.split("/")[0]}; --create-pr proposes a change.'
        elif status == 404:
            advice = 'There is no such repository or revision, or the token may not see it.'
        else:
            advice = 'Try again later.'
        return HubError(f'{where} was not changed: {sentence(cause)} {advice}')
    if cause is not None:
        return HubError(
            f'{where} was not reached, or the connection was cut ({type(cause).__name__}: {cause}). A commit takes '
            f'effect as a whole or not at all: look at its page, and try again.')
    if isinstance(error, (OSError, ValueError, RuntimeError)):
        return HubError(f'{where} was not changed: {sentence(error)}')
    return None


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f'{repo_id!r} is no name of a repository: {sentence(error)}') from error
    if repo_id.count('/') != 1:
        raise HubError(f'The repository must be named USER/NAME, got {repo_id!r}.')


def _list_files(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Names and sizes of what is sent, and why other things in the folder are not."""
    if not folder.is_dir():
        raise HubError(f'There is no folder {folder}.')
    files, left_out = {}, {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        needed = name in (WEIGHTS, CONFIG, CARD)
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            reason = 'a link; what it points to may lie outside of the folder'
        elif not stat.S_ISREG(mode):
            reason = 'no file'
        elif not name.isprintable() or '\\' in name:
            reason = 'a name that the Hub cannot have'
        elif name.startswith('.'):
            reason = 'hidden'
        elif not needed and not _EXTRAS.fullmatch(name):
            reason = 'neither part of a model nor a text or picture'
        else:
            files[name] = entry.stat().st_size
            continue
        if needed:
            raise HubError(f'{name} in {folder} is {reason}: nothing is published.')
        left_out[ascii(name)[1:-1]] = reason
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if name not in files]
    if missing:
        raise HubError(
            f'{folder} is no whole Hub folder: it has no {" and no ".join(missing)}. '
            f'`timm-shiftwise convert` writes one.')
    return files, left_out


def _read_card(folder: Path) -> str:
    try:
        return (folder / CARD).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f'{folder / CARD} cannot be read: {error}.') from error


def _stand_in(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file.resolve())
    except OSError:  # not everybody may make links on Windows
        shutil.copyfile(file, place)


def _check_loads(folder: Path) -> str:
    """Load what will be sent as a user would, and nothing else that lies in the folder.

    Returns:
        Name of the network.
    """
    output = None
    with tempfile.TemporaryDirectory() as alone:
        try:
            for name in (WEIGHTS, CONFIG):
                _stand_in(folder / name, Path(alone) / name)
            model = timm.create_model(f'local-dir:{alone}', pretrained=True).eval()
            if isinstance(model, ShiftwiseNet):
                with torch.inference_mode():
                    output = model(torch.zeros(1, *config_of(model)['input_size']))
        except Exception as error:  # whatever keeps it from loading
            told = sentence(error).replace(alone, str(folder))
            raise HubError(f'{folder} does not load, nothing is published: {told}') from error
    if output is None:
        raise HubError(f'{folder} holds a {type(model).__name__}, which is no network of this package.')
    if not output.isfinite().all():
        raise HubError(f'{folder} loads, but its weights give results that are not finite: nothing is published.')
    return str(config_of(cast(ShiftwiseNet, model))['architecture'])
