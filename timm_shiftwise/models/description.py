"""What a checkpoint's keys and shapes tell of its network."""
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg_value
from torch import Tensor

from timm_shiftwise.geometry import num_groups, small_padding
from timm_shiftwise.layers.wiring import split_ghost

from .layouts import MERGED_PATHS, CheckpointError, is_authors_layout, translate_authors_layout, unwrap
from .variants import SHIFTWISE, SHIFTWISE_V2

_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.')
_DEFAULTS: dict[str, Any] = dict(
    ghost_ratio=0., num_paths=1, num_shuffles=1, padding='full', ls_init_value=1e-6, reparameterized=False)


def describe_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tell which network a checkpoint belongs to.

    ``timm.create_model(found['model'], **found['model_args'])`` builds that network, unless ``found['unknown']`` names
    arguments that must be given as well.

    Args:
        state_dict: A state dict in our layout or the authors', bare or under ``model``, ``model_ema``, ``state_dict``
            or ``state_dict_ema``.

    Returns:
        A dict with

        * ``layout``: ``'timm-shiftwise'`` or ``'authors'``;
        * ``family``: ``'sw'``, ``'sw_v2'``, ``'p_sw'``, ``'eq_slak'`` or ``'slak'``;
        * ``model``: the registered network of these depths and dims, or else the first of the family;
        * ``model_args``: the arguments in which the checkpoint's network differs from that one;
        * ``groups``: G of each stage;
        * ``assumed``: arguments which the checkpoint does not tell and which were taken from the registered network;
        * ``unknown``: arguments which the checkpoint does not tell and where the registered network's cannot be right.

    Raises:
        CheckpointError: If the keys are neither our layout nor the authors', or those that tell the network are
            missing.
    """
    state = unwrap(state_dict)
    authors = is_authors_layout(state)
    if authors:
        state = translate_authors_layout(state)
    facts = _facts(state)
    family = facts.pop('family')
    model, variant = _nearest(family, facts)
    assumed: list[str] = []
    unknown: list[str] = []
    if 'focus_lengths' not in facts:
        lengths = variant['focus_lengths']
        agrees = len(lengths) == len(facts['groups']) and all(
            num_groups(m, facts['kernel_size']) == g for m, g in zip(lengths, facts['groups'], strict=True))
        (assumed if agrees else unknown).append('focus_lengths')
    if 'num_shuffles' not in facts and family in ('sw', 'sw_v2'):
        assumed.append('num_shuffles')
    if 'padding' not in facts and family == 'p_sw':
        assumed.append('padding')
    worked = facts.pop('worked')
    if family != 'slak':
        ratio = _ghost_ratio(facts['dims'], worked, 'v2' if family == 'sw_v2' else 'v1', variant)
        if ratio is None:
            unknown.append('ghost_ratio')
        else:
            facts['ghost_ratio'] = ratio
    groups = facts.pop('groups')
    channels, _, _ = get_pretrained_cfg_value(model, 'input_size') or (3, 0, 0)
    usual = {
        **_DEFAULTS, **variant,
        'num_classes': get_pretrained_cfg_value(model, 'num_classes'), 'in_chans': channels,
    }
    return dict(
        layout='authors' if authors else 'timm-shiftwise',
        family=family,
        model=model,
        model_args={name: value for name, value in facts.items() if value != usual[name]},
        groups=groups,
        assumed=tuple(assumed),
        unknown=tuple(unknown),
    )


def _facts(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the network that a state in our layout tells, and what else it tells of it."""
    found = [match for match in map(_BLOCK.match, state) if match]
    numbers = sorted({(int(match[1]), int(match[2])) for match in found})
    depths = Counter(stage for stage, _ in numbers)
    blocks = [f'stages.{i}.blocks.0' for i in range(len(depths))]
    if not blocks or numbers != [(i, j) for i in range(len(depths)) for j in range(depths[i])]:
        raise CheckpointError(f"The checkpoint is none of these networks': its keys begin with {_listed(state)}.")

    def told(key: str, *axes: int) -> Tensor:
        if key not in state:
            raise CheckpointError(f'The checkpoint does not tell its network: {key} is missing.')
        shape = tuple(state[key].shape)
        if len(shape) not in axes or 0 in shape:
            raise CheckpointError(f'The checkpoint does not tell its network: {key} has the shape {shape}.')
        return state[key]

    def every(suffix: str, *axes: int) -> list[Tensor]:
        tensors = [told(name + suffix, *axes) for name in blocks]
        if len({tensor.ndim for tensor in tensors}) > 1:
            raise CheckpointError(f'The checkpoint does not tell its network: {suffix[1:]} differs between its stages.')
        return tensors

    def has(suffix: str) -> bool:
        return blocks[0] + suffix in state

    facts: dict[str, Any] = dict(
        depths=tuple(depths[i] for i in range(len(depths))),
        dims=tuple(weight.shape[1] for weight in every('.mlp.fc1.weight', 2)),
        num_classes=told('head.fc.weight', 2).shape[0] if 'head.fc.weight' in state else 0,
        reparameterized=has('.conv_dw.bias'),
    )
    if 'stem.0.weight' in state:
        facts['in_chans'] = told('stem.0.weight', 4).shape[1]
    if not has('.gamma') and not facts['reparameterized']:
        facts['ls_init_value'] = None
    for wide in ('.conv_dw.conv_h.weight', '.conv_dw.wide'):
        if has(wide):
            _add_slak_facts(facts, every(wide, 3, 4))
            return facts
    weights = every(f'.conv_dw.{MERGED_PATHS}' if has(f'.conv_dw.{MERGED_PATHS}') else '.conv_dw.weight', 4, 5)
    facts.update(kernel_size=weights[0].shape[-1], worked=tuple(weight.shape[-4] for weight in weights))
    if weights[0].ndim == 5:
        facts['num_paths'] = weights[0].shape[0]
    maps = tuple(weight.shape[-3] for weight in weights)
    # the ablation has one order and one path, and no channel passes through
    family = 'sw'
    if facts['worked'] == facts['dims'] and facts.get('num_paths', 1) == 1 and not has(f'.conv_dw.{MERGED_PATHS}'):
        family = 'p_sw'
    facts['groups'] = maps
    if has('.conv_dw.horizontal'):
        tables = every('.conv_dw.horizontal', 3)
        facts.update(groups=tuple(table.shape[-1] for table in tables), num_shuffles=tables[0].shape[0])
        if maps != facts['groups']:
            family = 'eq_slak'
        elif max(maps) > 1 and not any(table.is_meta for table in tables):
            family = 'p_sw' if all(_is_natural(table) for table in tables) else 'sw'
    facts['family'] = 'sw_v2' if has('.se.fc1.weight') else family
    geometry = [state.get(f'{name}.conv_dw.geometry') for name in blocks]
    if all(table is not None and not table.is_meta and table.numel() == 3 for table in geometry):
        lengths, sizes, pads = zip(*(table.tolist() for table in geometry if table is not None), strict=True)
        facts['focus_lengths'] = lengths
        # the two policies agree for N = 1 and N = 2
        facts['padding'] = 'full' if pads[0] == small_padding(sizes[0], 'full') else 'same'
    return facts


def _add_slak_facts(facts: dict[str, Any], wide: list[Tensor]) -> None:
    # [C, 1, N, M]; merged kernels of even sides have one row or column more
    size = wide[0].shape[-2]
    lengths = tuple(kernel.shape[-1] for kernel in wide)
    facts.update(
        family='slak',
        kernel_size=size,
        focus_lengths=lengths,
        groups=tuple(num_groups(m, size) for m in lengths),
        worked=facts['dims'],
    )


def _is_natural(table: Tensor) -> bool:
    """Whether every channel's groups [R, C, G] are in natural order."""
    return bool((table == table.new_tensor(range(table.shape[-1]))).all())


def _nearest(family: str, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered network of the family that agrees in most of the arguments that tell its size."""
    if family == 'sw_v2':
        candidates = SHIFTWISE_V2
    else:
        candidates = {name: variant for name, variant in SHIFTWISE.items() if variant['operator'] == family}

    def agreement(variant: dict[str, Any]) -> tuple[bool, bool]:
        same_size = all(variant[name] == facts[name] for name in ('depths', 'dims'))
        return same_size, variant.get('padding') == facts.get('padding')

    # max takes the first of equals
    name = max(candidates, key=lambda name: agreement(candidates[name]))
    return name, candidates[name]


def _ghost_ratio(
        dims: tuple[int, ...],
        worked: tuple[int, ...],
        rule: str,
        variant: dict[str, Any],
) -> float | None:
    """The registered network's ratio, or else the shortest decimal fraction, that leaves these channels to work on."""
    if worked == dims and rule == 'v1':
        return 0.
    share = 1 - worked[0] / dims[0]
    tried = [variant.get('ghost_ratio', 0.), 0.]
    for digits in (1, 2, 3):
        nearest = range(max(round((share - 0.06) * 10 ** digits), 0), round((share + 0.06) * 10 ** digits) + 1)
        tried += sorted((k / 10 ** digits for k in nearest), key=lambda ratio: abs(ratio - share))
    for ratio in tried:
        try:
            if all(len(split_ghost(dim, ratio, rule)[0]) == kept for dim, kept in zip(dims, worked, strict=True)):
                return ratio
        except ValueError:
            continue
    return None


def _listed(state: dict[str, Tensor], most: int = 5) -> str:
    return ', '.join(list(state)[:most]) or 'nothing'
