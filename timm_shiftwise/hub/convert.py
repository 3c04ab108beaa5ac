"""From a checkpoint to a folder that timm and the Hub understand: model.safetensors, config.json, README.md."""
import inspect
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import timm
import torch
from huggingface_hub import EvalResult
from safetensors import SafetensorError
from timm.data import create_dataset, create_transform, resolve_data_config, resolve_model_data_config
from timm.models import get_pretrained_cfg_value, resolve_pretrained_cfg, save_for_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.models import ShiftwiseNet, calibrate
from timm_shiftwise.models.checkpoint import checkpoint_filter_fn, describe_checkpoint
from timm_shiftwise.models.pretrained import AUTHORS_TAG, LICENSE_OF_THE_AUTHORS
from timm_shiftwise.models.variants import SHIFTWISE, SHIFTWISE_V2
from timm_shiftwise.profile import Cost, profile_model

from .errors import HubError
from .model_card import CardFacts, Provenance, config_of, write_card
from .pictures import Pictures, draw_pictures
from .results import results_of_run, results_of_validation
from .source import Source, read_source

_VARIANTS = {**SHIFTWISE, **SHIFTWISE_V2}
_TOLERANCE = 1e-4
_IMAGES_TO_CALIBRATE = 256
_SOURCE_PREFIXES = ('hf-hub:', 'hf_hub:', 'local-dir:')
# what train.py's --model-kwargs may hold beside arguments that the weights were made for
_OF_THE_RUN = (
    'drop_rate', 'drop_path_rate', 'backend', 'sparsity', 'prune_rate', 'prune_interval', 'sparsity_init',
    'sparsity_steps', 'sparsity_seed', 'mask_sharing_interval',
)
_NOT_TOLD = ('return', 'device', 'dtype', *_OF_THE_RUN)
_MOST = 64
"""Paths, and shuffles, of a network whose checkpoint does not tell them: those that there are have 1 to 4."""
_MOST_PIXELS = 512
"""Sides of the image whose logits are compared."""
_TOLD_BY_CONFIG = (
    'tag', 'input_size', 'test_input_size', 'min_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'crop_mode',
    'mean', 'std', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes',
)


@dataclass(frozen=True)
class Network:
    """A registered network with the arguments that a checkpoint asks for.

    Attributes:
        name: Name in timm's registry.
        args: Arguments of ``timm.create_model`` beside the name.
        layout: Whose layout the checkpoint was in, ``'timm-shiftwise'``, ``'authors'`` or ``'convnext'``.
        assumed: Arguments which nothing told and which are the registered network's own.
    """
    name: str
    args: dict[str, Any]
    layout: str
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Attributes:
        folder: The Hub folder.
        weights: The file that was read.
        network: What it was read as.
        cost: What the network in the folder costs for an image.
        merged: Whether the network in the folder is merged for inference.
        error: Largest difference between the logits of the source and of the folder, as a share of the largest logit.
        pictures: Names of the pictures in the folder.
        not_drawn: Why a picture is missing; None if none is.
    """
    folder: Path
    weights: Path
    network: Network
    cost: Cost
    merged: bool
    error: float
    pictures: tuple[str, ...]
    not_drawn: str | None


def convert(
        source: str | Path, output: str | Path, model: str | None = None, model_args: Mapping[str, Any] | None = None,
        *, reparameterize: bool = False, use_ema: bool = True, overwrite: bool = False,
        images_to_calibrate: str | Path | None = None, provenance: Provenance | None = None,
        validated: Sequence[tuple[str | Path, str]] = (), pictures: bool = False,
        images_to_show: str | Path | None = None) -> Conversion:
    """Turn a checkpoint into a Hub folder, and check that the folder gives the same logits.

    The folder is written under another name beside its place and renamed when it is whole.

    Args:
        source: A checkpoint of ours, in the authors' layout, or of a ConvNeXt, an output folder of train.py, or a Hub
            folder.
        output: The folder to write.
        model: Name of the network; None to tell it from the checkpoint, which that of a ConvNeXt does not.
        model_args: Arguments of ``timm.create_model`` that the checkpoint does not tell.
        reparameterize: Merge the network for inference.
        use_ema: Prefer the averaged weights where a checkpoint has both.
        overwrite: Replace the folder if there is one.
        images_to_calibrate: A folder of images to calibrate the network by, see
            :func:`timm_shiftwise.calibrate`.
        provenance: What to say of the weights in the model card.
        validated: Pairs of a results file of timm's validate.py and the data set, as the Hub names it, for the model
            card.
        pictures: Draw the effective receptive field and the kept groups for the model card, if matplotlib is there.
        images_to_show: A folder of images to measure the receptive field on; None for Gaussian noise.

    Raises:
        HubError: If the source cannot be read, its network cannot be told, or the folder does not hold what it should.
        CheckpointError: If the weights do not fit the network.
        OSError: If the folder cannot be written.
    """
    output = Path(output)
    _check_output(output, overwrite)
    found = read_source(source, use_ema)
    network = tell_network(found, model, model_args)
    net = build_network(network)
    net.load_state_dict(checkpoint_filter_fn(found.state, net))
    net.eval()
    provenance = provenance or Provenance()
    _configure(net, found, network, provenance.license)
    measured = _measured(net, found, provenance.dataset, validated)
    images = _images(net)
    logits = _logits(net, images)
    if not logits.isfinite().all():
        raise HubError(f'The weights of {found.file} give logits that are not finite.')
    with torch.inference_mode():
        # how much single precision alone is off: what a merged network, rounded anew, may be, too
        noise = _distance(net(images), logits)
    if images_to_calibrate is not None:
        _calibrate(net, Path(images_to_calibrate))
    args = dict(network.args)
    if reparameterize and not args.get('reparameterized'):
        cfg = config_of(net)
        net = cast(ShiftwiseNet, reparameterize_model(net))
        _set_config(net, cfg)
        args['reparameterized'] = True
    profile = profile_model(net)
    facts = CardFacts(
        title=output.name,
        reference=f'local-dir:{output}',
        architecture=network.name,
        layout=network.layout,
        profile=profile,
        train_args=found.train_args,
        summary=found.summary,
        provenance=provenance,
        measured=measured,
    )
    drawn = Pictures()
    with _whole_folder(output, overwrite) as folder:
        if pictures:
            drawn = draw_pictures(net, profile, folder, (images.shape[2], images.shape[3]), images_to_show)
        write_folder(net, folder, args, replace(facts, drawn=drawn.section), _labels(found))
        error = _compare(folder, images, logits, max(_TOLERANCE, 4 * noise))
    return Conversion(
        output, found.file, network, profile.whole.ours, bool(args.get('reparameterized')), error, drawn.files,
        drawn.missing)


def write_folder(
        model: ShiftwiseNet, folder: Path, model_args: Mapping[str, Any], facts: CardFacts,
        labels: Mapping[str, Any] | None = None) -> None:
    """Write a network as a Hub folder.

    Args:
        model: The network; its ``pretrained_cfg`` goes into config.json.
        folder: Where to write; it must exist.
        model_args: Arguments of ``timm.create_model`` that build the network.
        facts: What the model card says.
        labels: ``label_names`` and ``label_descriptions`` of config.json.

    Raises:
        HubError: If an argument cannot be written as JSON.
        OSError: If a file cannot be written.
    """
    try:
        save_for_hf(
            model, str(folder), model_config=dict(labels or {}), model_args=dict(model_args), safe_serialization=True)
    except SafetensorError as error:
        raise OSError(f'The weights could not be written to {folder}: {error}.') from error
    except (TypeError, ValueError) as error:
        raise HubError(f'config.json cannot be written: {error}') from error
    config = json.loads((folder / 'config.json').read_text())
    # it stands beside these arguments, too, and transformers, which builds the network of both, takes it only once
    config.get('model_args', {}).pop('num_classes', None)
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    # safetensors may keep its file from everybody else; the others follow the umask
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')
    write_card(model, folder / 'README.md', facts)


def tell_network(source: Source, model: str | None, model_args: Mapping[str, Any] | None) -> Network:
    """Tell which network a checkpoint is for, from what the user, the folder and the weights say, in this order.

    Raises:
        HubError: If they contradict each other, or leave an argument open.
        CheckpointError: If the weights are none of these networks'.
    """
    found = describe_checkpoint(source.state)
    if found['layout'] == 'convnext' and model is None:
        raise HubError(
            f'The checkpoint is that of a ConvNeXt, none of these networks: `--model {found["model"]}`, of `convert` '
            f'also `--to {found["model"]}`, grows it to one.')
    name = model or source.config.get('architecture') or source.train_args.get('model') or found['model']
    if not isinstance(name, str) or (model is None and name.startswith(_SOURCE_PREFIXES)):
        name = found['model']
    name = name.split('.')[0]
    if name not in _VARIANTS:
        raise HubError(f'{name!r} is no network of this package. There are {", ".join(_VARIANTS)}.')
    same = name in (found['model'], f'eq_{found["model"]}')
    kept = None if same else ('num_classes', 'in_chans', 'reparameterized')
    args = {key: value for key, value in found['model_args'].items() if kept is None or key in kept}
    pool = source.train_args.get('gp')
    pooling = {'global_pool': pool} if pool else {}
    for told in (source.config.get('model_args'), pooling, source.train_args.get('model_kwargs'), model_args):
        if told is None:
            continue
        if not isinstance(told, Mapping):
            raise HubError(f'The arguments of the network must be names and values, got {reprlib.repr(told)}.')
        args.update({key: value for key, value in told.items() if key not in _OF_THE_RUN})
    _check_arguments(name, args)
    for key in found['unknown']:
        if key not in args:
            raise HubError(
                f'The checkpoint does not tell {key}, and {name} does not have these shapes: give it with '
                f'--model-kwargs {key}=VALUE.')
    _check_sizes(name, args, found)
    return Network(name, args, found['layout'], tuple(key for key in found['assumed'] if key not in args))


def _check_arguments(name: str, args: Mapping[str, Any]) -> None:
    """Refuse what no network of ours takes: some arguments of ``timm.create_model`` fetch, read or run something."""
    hints = {key: hint for key, hint in get_type_hints(ShiftwiseNet.__init__).items() if key not in _NOT_TOLD}
    for key, value in args.items():
        if key not in hints:
            raise HubError(
                f'{name} has no argument {reprlib.repr(key)} that tells its network; there are {", ".join(hints)}.')
        if not _is_of_type(value, hints[key]):
            wanted = inspect.formatannotation(hints[key])
            raise HubError(f'{key} of {name} must be {wanted}, got {reprlib.repr(value)}.')


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value, as JSON or YAML have it, is of an annotated type: lists are tuples, integers are numbers."""
    if get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(_is_of_type(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is not None:
        return any(_is_of_type(value, each) for each in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _check_sizes(name: str, args: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse another size than the checkpoint's before a network of that size is built."""
    channels, *_ = get_pretrained_cfg_value(found['model'], 'input_size') or (3,)
    usual = dict(num_classes=get_pretrained_cfg_value(found['model'], 'num_classes'), in_chans=channels)
    seen = {**usual, **_VARIANTS[found['model']], **found['model_args']}
    wanted = {**seen, **_VARIANTS[name], **args}
    sizes = ['depths', 'dims', 'kernel_size', 'num_classes', 'in_chans']
    if found['layout'] == 'timm-shiftwise' and not seen.get('reparameterized'):
        sizes += ['num_paths', 'num_shuffles']
    problems = [
        f'{key}={seen[key]!r}, the network has {reprlib.repr(wanted[key])}'
        for key in sizes if key in seen and _plain(seen[key]) != _plain(wanted[key])
    ]
    problems += [
        f'no more than {_MOST} {key}, the network has {wanted[key]}'
        for key in ('num_paths', 'num_shuffles') if wanted.get(key, 1) > _MOST
    ]
    lengths = wanted['focus_lengths']
    groups = [num_groups(length, seen['kernel_size']) for length in lengths] if min(lengths, default=0) > 0 else None
    fits = found['layout'] == 'convnext' or groups == list(found['groups'])  # a ConvNeXt has no groups
    if groups is None or not (fits or problems):
        problems.append(f'{list(found["groups"])} groups, the network has focus_lengths={reprlib.repr(lengths)}')
    if problems:
        raise HubError(
            f'The checkpoint is none of {name}: it has {"; ".join(problems)}. '
            f'By its shapes it is of {found["model"]} with {found["model_args"] or "no other arguments"}.')


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def build_network(network: Network) -> ShiftwiseNet:
    """Build the network of a checkpoint, without its weights.

    Raises:
        HubError: If it cannot be built with these arguments.
    """
    try:
        return cast(ShiftwiseNet, timm.create_model(network.name, **network.args))
    except (AssertionError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise HubError(f'{network.name} cannot be built with {network.args}: {error}') from error


def _configure(model: ShiftwiseNet, source: Source, network: Network, license: str | None) -> None:
    """Set what config.json says of inputs and outputs: what training used, else what the network's usual cfg says.

    Of a licence it says what the user says, else what the source says, and nothing if neither does.
    """
    usual = resolve_pretrained_cfg(network.name)
    cfg = usual.to_dict(remove_source=True)
    cfg.update(tag=None, license=None)
    if network.layout == 'authors':
        cfg.update(tag=AUTHORS_TAG, license=LICENSE_OF_THE_AUTHORS)
    if 'sw_convnext' in network.name:
        cfg.update(_published_convnext(source) or {'origin_url': None})
    told = source.config.get('pretrained_cfg')
    if isinstance(told, dict):
        cfg.update((key, value) for key, value in told.items() if key in _TOLD_BY_CONFIG)
    cfg.update(architecture=network.name, num_classes=model.num_classes, license=license or cfg['license'])
    used = {key: source.train_args.get(key) for key in (
        'input_size', 'img_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    used['in_chans'] = model.in_chans
    try:
        if used['input_size'] is None and used['img_size'] is None:
            used['input_size'] = (model.in_chans, *cfg['input_size'][1:])
        for key in ('mean', 'std'):
            if used[key] is None and len(cfg[key]) != model.in_chans:
                used[key] = [sum(cfg[key]) / len(cfg[key])] * model.in_chans
        data = resolve_data_config(used, pretrained_cfg=cfg)
        if data['input_size'] != tuple(usual.input_size):
            cfg['pool_size'] = None
        cfg.update(data)
        sizes = [int(size) for size in data['input_size']]
        if len(sizes) != 3 or sizes[0] != model.in_chans or not all(1 <= size <= 4096 for size in sizes):
            raise ValueError(f'input_size {data["input_size"]!r} for {model.in_chans} channels')
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise HubError(f'The input that {source.file.parent} tells is no input: {error}.') from error
    _set_config(model, cfg)


def _published_convnext(source: Source) -> dict[str, Any]:
    """What timm says of the weights of a ConvNeXt that a Hub folder names; empty for others."""
    told = source.config.get('pretrained_cfg')
    name, tag = source.config.get('architecture'), told.get('tag') if isinstance(told, dict) else None
    cfg = timm.models.get_arch_pretrained_cfgs(str(name)).get(f'{name}.{tag}')
    if cfg is None:
        return {}
    return {**cfg.to_dict(remove_source=True), 'origin_url': f'https://huggingface.co/{cfg.hf_hub_id}'}


def _calibrate(model: ShiftwiseNet, folder: Path) -> None:
    """Calibrate by images from all over a folder, prepared as the network's configuration says."""
    mode = 'L' if model.in_chans == 1 else 'RGB'
    try:
        dataset = create_dataset('', root=str(folder), input_img_mode=mode)
        dataset.transform = create_transform(**resolve_model_data_config(model))
        chosen = range(0, len(dataset), max(len(dataset) // _IMAGES_TO_CALIBRATE, 1))[:_IMAGES_TO_CALIBRATE]
        calibrate(model, DataLoader(Subset(dataset, chosen), batch_size=32))
    except (OSError, RuntimeError, ValueError) as error:
        raise HubError(f'The network cannot be calibrated by the images in {folder}: {error}') from error


def _measured(
        model: ShiftwiseNet, source: Source, dataset: str | None,
        validated: Sequence[tuple[str | Path, str]]) -> list[tuple[EvalResult, str]]:
    """Results of a network that is not merged yet, and by what they were measured."""
    cfg = config_of(model)
    found = [
        (result, 'train.py, of these weights in the training run')
        for result in results_of_run(source, cfg, model.num_classes, dataset)]
    if validated:
        counts = [sum(map(Tensor.numel, each.parameters())) for each in (model, reparameterize_model(model))]
        found += [
            (result, "timm's validate.py, of these weights") for file, name in validated
            for result in results_of_validation(file, name, cfg['architecture'], counts, model.num_classes)]
    return found


def _set_config(model: ShiftwiseNet, cfg: dict[str, Any]) -> None:
    vars(model).update(pretrained_cfg=cfg, default_cfg=cfg)


def _labels(source: Source) -> dict[str, Any]:
    return {key: source.config[key] for key in ('label_names', 'label_descriptions') if source.config.get(key)}


def _images(model: ShiftwiseNet) -> Tensor:
    channels, *sides = config_of(model)['input_size']
    # a network takes any size, and a configuration can name one that fills the memory
    sides = [min(side, _MOST_PIXELS) for side in sides]
    return torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of single precision weights, computed in double precision so that rounding does not hide a difference."""
    logits = model.double()(images.double())
    model.float()
    return logits


def _distance(logits: Tensor, wanted: Tensor) -> float:
    return ((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def _compare(folder: Path, images: Tensor, logits: Tensor, tolerance: float) -> float:
    """Load a folder through timm and return how far its logits are off."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    error = _distance(_logits(model, images), logits)
    if not error <= tolerance:
        raise HubError(
            f'The folder does not give the logits of the source: they differ by {error:.1e} of the largest, '
            f'at most {tolerance:.0e} is allowed.')
    return error


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.name or output.name == '..':
        raise HubError(f'{str(output)!r} names no folder to write.')
    if os.path.lexists(output) and not overwrite:
        raise HubError(f'{output} is there already; --overwrite replaces it.')
    if os.path.lexists(output) and (output.is_symlink() or not (output / 'config.json').is_file()):
        raise HubError(f'{output} is no Hub folder: it is not replaced.')


@contextmanager
def _whole_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output which takes its place when the body is through, and is removed if it is not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', suffix='.partial', dir=output.parent))
    try:
        yield partial
        for file in partial.iterdir():
            _flush(file)
        partial.chmod(0o777 & ~_umask())
        _check_output(output, overwrite)
        if output.exists():
            aside = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', suffix='.old', dir=output.parent))
            output.rename(aside / output.name)
            partial.rename(output)
            shutil.rmtree(aside)
        else:
            partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(file: Path) -> None:
    # the rename must not reach the disk before the content
    with file.open('rb') as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
