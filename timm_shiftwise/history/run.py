"""Reading a run of train.py while it goes on: its curves, and the masks of each epoch whose checkpoint is there."""
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from timm_shiftwise.hub.convert import build_network, tell_network
from timm_shiftwise.hub.errors import HubError
from timm_shiftwise.hub.source import MAX_EPOCHS, Source, number, read_epoch, read_run, read_weights
from timm_shiftwise.models import CheckpointError, ShiftwiseNet, checkpoint_filter_fn
from timm_shiftwise.profile import NetworkGroups, network_groups

from .record import Epoch, Stamp, read_record, write_record

_LATEST = 'last.pth.tar'
_ARGUMENTS, _SUMMARY = 'args.yaml', 'summary.csv'
_CHECKPOINTS = (_LATEST, 'model_best.pth.tar', 'checkpoint-*.pth.tar', 'milestone-*.pth.tar')
"""What train.py writes at the end of epochs; what it writes in the middle of one is not looked at."""


class NoRunError(RuntimeError):
    """There is no run, or no checkpoint of it yet: the message names the folder, and says what was looked for."""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: Its folder.
        model: Name of the network.
        args: The arguments of train.py; empty if they are not there.
        curves: The numbers of summary.csv by column and epoch.
        network: The network with the weights that the latest checkpoint trains.
        groups: The groups that it keeps; None for a network of large kernels, which has none.
        epochs: The epochs that are known, in order; of a network without groups the latest alone.
        passed_over: Why checkpoints were not read, a sentence for each.
    """
    folder: Path
    model: str
    args: Mapping[str, Any]
    curves: Mapping[str, Mapping[int, float]]
    network: ShiftwiseNet
    groups: NetworkGroups | None
    epochs: tuple[Epoch, ...]
    passed_over: tuple[str, ...]


class _PassedOver(Exception):
    """A checkpoint cannot be read now."""


class _Checkpoint(NamedTuple):
    epoch: int
    file: Path
    stamp: Stamp


def find_run(folder: Path) -> Path:
    """The folder of a run: the given one, or, of those that it holds, the one that was begun last.

    Raises:
        NoRunError: If there is none.
    """
    if (folder / _ARGUMENTS).is_file() or stamps_of(folder):
        return folder
    runs = [file for file in folder.glob(f'*/{_ARGUMENTS}') if file.is_file()]
    if not runs:
        raise NoRunError(
            f'{folder} is no run of train.py, and holds none: looked for {_ARGUMENTS}, {", ".join(_CHECKPOINTS)} and '
            f'*/{_ARGUMENTS}.')
    return max(runs, key=lambda file: file.stat().st_mtime_ns).parent


def stamps_of(folder: Path) -> dict[Path, Stamp]:
    """The files of a run that tell of its epochs, and what changes when train.py writes them anew."""
    files = [folder / _SUMMARY, *(file for pattern in _CHECKPOINTS for file in folder.glob(pattern))]
    return {file: stamp for file in files if (stamp := _stamp(file)) is not None}


def read_history(folder: Path, record: Path) -> Run:
    """Read a run, and keep the masks of every epoch that is seen in a file.

    A checkpoint that cannot be read, because it is being written or its run diverged, is passed over. One that was read
    before is not read again, unless it is the latest. One checkpoint at a time is in memory.

    Args:
        folder: The folder of the run.
        record: The file that holds the masks of epochs seen before, if there is one; it is written anew.

    Raises:
        NoRunError: If no checkpoint can be read.
        RecordError: If the file holds the masks of another run, or is broken.
        HubError: If the arguments of the run are broken, or are not those of its checkpoints.
        CheckpointError: If the network is none of this package.
        OSError: If the file cannot be written.
    """
    args, rows = read_run(folder)
    checkpoints, passed_over = _newest_of_each_epoch(folder)
    network, name, latest = None, '', None
    while checkpoints and network is None:
        latest = checkpoints.pop()
        try:
            network, name = _load(latest, args)
        except _PassedOver as reason:
            passed_over.append((latest.file, str(reason)))
    if network is None or latest is None:
        wrong = ' '.join(_still_there(passed_over)) or f'looked for {", ".join(_CHECKPOINTS)}.'
        raise NoRunError(f'{folder} has no checkpoint that can be read: {wrong}')
    groups = _groups(network)
    now = _epoch(latest, network.state_dict(), groups)
    if groups is None:
        epochs = [now]
    else:
        identity = _identity(name, args, folder, record, now)
        known = read_record(record, identity, [mask.shape for mask in now.masks])
        # a run that was resumed from an earlier epoch has not come to later ones yet
        known = {at: epoch for at, epoch in known.items() if at < now.number} | {now.number: now}
        for checkpoint in checkpoints:
            before = known.get(checkpoint.epoch)
            if before is not None and before.stamp == checkpoint.stamp:
                continue
            try:
                known[checkpoint.epoch] = _epoch(checkpoint, _fitting(checkpoint, network), groups)
            except _PassedOver as reason:
                passed_over.append((checkpoint.file, str(reason)))
        epochs = [known[at] for at in sorted(known)]
        write_record(record, identity, epochs)
    return Run(
        folder, name, args, curves_of(rows), network, groups, tuple(epochs), tuple(_still_there(passed_over)))


def curves_of(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[int, float]]:
    """The numbers of a summary.csv by column and epoch; what is no finite number is left out.

    Where a run was resumed, what follows counts, and nothing of what it had told of these epochs and later ones before.
    """
    told: dict[int, Mapping[str, str]] = {}
    for row in rows:
        at = number(row.get('epoch'))
        if not 0 <= at < MAX_EPOCHS:  # older versions of timm write the heading again
            continue
        told = {epoch: other for epoch, other in told.items() if epoch < at}
        told[int(at)] = row
    curves: dict[str, dict[int, float]] = {}
    for epoch, row in told.items():
        for column, text in row.items():
            value = number(text)
            if math.isfinite(value) and column != 'epoch':
                curves.setdefault(column, {})[epoch] = value
    return curves


def _newest_of_each_epoch(folder: Path) -> tuple[list[_Checkpoint], list[tuple[Path, str]]]:
    """Checkpoints by epoch, none after the latest of train.py, and why others could not be read."""
    found: dict[int, _Checkpoint] = {}
    passed_over = []
    latest = math.inf
    for file, stamp in stamps_of(folder).items():
        if file.name == _SUMMARY:
            continue
        try:
            seen = _Checkpoint(read_epoch(file), file, stamp)
        except HubError as error:
            passed_over.append((file, str(error)))
            continue
        latest = seen.epoch if file.name == _LATEST else latest
        # most are other names of one file; of others one is from before the run was resumed
        found[seen.epoch] = max(found.get(seen.epoch, seen), seen, key=lambda each: each.stamp)
    return [found[epoch] for epoch in sorted(found) if epoch <= latest], passed_over


def _read(checkpoint: _Checkpoint) -> dict[str, Tensor]:
    try:
        state = read_weights(checkpoint.file, use_ema=False)  # an average of the weights takes its masks from them
    except HubError as error:
        raise _PassedOver(str(error)) from error
    if _stamp(checkpoint.file) != checkpoint.stamp:
        raise _PassedOver(f'The checkpoint {checkpoint.file} was replaced while it was read.')
    return state


def _load(checkpoint: _Checkpoint, args: dict[str, Any]) -> tuple[ShiftwiseNet, str]:
    """The network of a checkpoint, with its weights, and its name."""
    state = _read(checkpoint)
    told = tell_network(Source(checkpoint.file, state, train_args=args), None, None)
    network = build_network(told)
    try:
        network.load_state_dict(state)
    except CheckpointError as error:
        raise _PassedOver(f'{checkpoint.file}: {error}') from error
    return network, told.name


def _fitting(checkpoint: _Checkpoint, network: ShiftwiseNet) -> dict[str, Tensor]:
    """The weights of another checkpoint of a network, in its layout."""
    try:
        return checkpoint_filter_fn(_read(checkpoint), network)
    except CheckpointError as error:
        raise _PassedOver(f'{checkpoint.file}: {error}') from error


def _epoch(checkpoint: _Checkpoint, state: Mapping[str, Tensor], groups: NetworkGroups | None) -> Epoch:
    layers = [] if groups is None else [layer for stage in groups.stages for layer in stage.layers]
    masks = [state[f'{layer.name}.group_mask'].numpy() for layer in layers]
    return Epoch(
        checkpoint.epoch,
        int(state.get('sparsity.step', 0)),
        checkpoint.stamp,
        tuple(mask.reshape(-1, *mask.shape[-2:]).copy() for mask in masks),  # [P, C, K]
    )


def _still_there(passed_over: Iterable[tuple[Path, str]]) -> list[str]:
    """Why checkpoints were passed over, without those that train.py has removed meanwhile."""
    return [reason for file, reason in passed_over if file.exists()]


def _stamp(file: Path) -> Stamp | None:
    try:
        status = os.stat(file)
    except OSError:  # train.py has removed it meanwhile
        return None
    return status.st_mtime_ns, status.st_size


def _groups(network: ShiftwiseNet) -> NetworkGroups | None:
    try:
        return network_groups(network)
    except ValueError:
        return None


def _identity(model: str, args: Mapping[str, Any], folder: Path, record: Path, now: Epoch) -> dict[str, Any]:
    """What tells a run from others, however often it is resumed or moved, as JSON gives it back."""
    told = {
        'model': model,
        'model_kwargs': args.get('model_kwargs'),
        'seed': args.get('seed'),
        'folder': os.path.relpath(folder.resolve(), record.resolve().parent),
        'masks': [mask.shape for mask in now.masks],
    }
    return json.loads(json.dumps(told, default=str))
