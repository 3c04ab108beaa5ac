"""What a checkpoint's keys and shapes tell of its network."""
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import get_pretrained_cfg_value
from torch import Tensor

from timm_shiftwise.geometry import num_groups, small_padding
from timm_shiftwise.layers.wiring import split_ghost

from .grow import refuse_original, with_linear_layers
from .layouts import (
    AUTHORS,
    CONVNEXT,
    MERGED_PATHS,
    VERSION_0_1,
    CheckpointError,
    layout_of,
    rename_version_0_1,
    translate_authors_layout,
    unwrap,
)
from .variants import SHIFTWISE, SHIFTWISE_V2

_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.')
_TRANSLATIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    AUTHORS: translate_authors_layout, VERSION_0_1: rename_version_0_1, CONVNEXT: with_linear_layers}
_DEFAULTS: dict[str, Any] = dict(
    ghost_ratio=0., num_paths=1, num_shuffles=1, single_centre=False, centre_norm=True, padding='full',
    ls_init_value=1e-6, reparameterized=False)


def describe_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tell which network a checkpoint belongs to.

    ``timm.create_model(found['model'], **found['model_args'])`` builds that network, unless ``found['unknown']`` names
    arguments that must be given as well.

    Args:
        state_dict: A state dict in our layout, that of version 0.1, the authors' or that of timm's ConvNeXts, bare or
            under ``model``, ``model_ema``, ``state_dict`` or ``state_dict_ema``.

    Returns:
        A dict with

        * ``layout``: ``'timm-shiftwise'``, that of version 0.1 included, ``'authors'``, or ``'convnext'``, from which
          the network can be grown;
        * ``family``: ``'sw'``, ``'sw_v2'``, ``'p_sw'``, ``'eq_slak'`` or ``'slak'``;
        * ``model``: the registered network of these depths and dims, or else the first of the family;
        * ``model_args``: the arguments in which the checkpoint's network differs from that one;
        * ``groups``: G of each stage; empty for a ConvNeXt;
        * ``assumed``: arguments which the checkpoint does not tell and which were taken from the registered network;
        * ``unknown``: arguments which the checkpoint does not tell and where the registered network's cannot be right.

    Raises:
        CheckpointError: If the keys are of none of these layouts, those that tell the network are missing, or none of
            our networks can be grown from the ConvNeXt.
    """
    state = unwrap(state_dict)
    layout = layout_of(state)
    refuse_original(state)
    if layout in _TRANSLATIONS:
        state = _TRANSLATIONS[layout](state)
    facts = _facts(state)
    family = facts.pop('family')
    model, variant = _nearest(family, facts)
    assumed: list[str] = []
    unknown: list[str] = []
    if 'focus_lengths' not in facts:
        lengths = variant['focus_lengths']
        groups = tuple(num_groups(m, facts['kernel_size']) for m in lengths)
        agrees = layout == CONVNEXT or groups == facts['groups']
        (assumed if agrees else unknown).append('focus_lengths')
    if 'num_shuffles' not in facts and family in ('sw', 'sw_v2') and not facts['reparameterized']:
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
        layout=layout if layout in (AUTHORS, CONVNEXT) else 'timm-shiftwise',
        family=family,
        model=model,
        model_args={name: value for name, value in facts.items() if value != usual[name]},
        groups=groups,
        assumed=tuple(assumed),
        unknown=tuple(unknown),
    )


class _Blocks:
    """The first block of each stage of a state in our layout, and what shapes it has.

    Args:
        state: The state.

    Raises:
        CheckpointError: If the blocks are not numbered as those of a network are.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        numbers = sorted({(int(match[1]), int(match[2])) for match in map(_BLOCK.match, state) if match})
        depths = Counter(stage for stage, _ in numbers)
        if not numbers or numbers != [(i, j) for i in range(len(depths)) for j in range(depths[i])]:
            raise CheckpointError(f"The checkpoint is none of these networks': its keys begin with {_listed(state)}.")
        self.state = state
        self.depths = tuple(depths[i] for i in range(len(depths)))
        self.names = [f'stages.{i}.blocks.0' for i in range(len(depths))]

    def has(self, suffix: str) -> bool:
        """Whether the first stage has a tensor of this name."""
        return self.names[0] + suffix in self.state

    def every(self, suffix: str, *axes: int) -> list[Tensor]:
        """The tensor of this name of each stage, of one of the numbers of axes."""
        tensors = [self.told(name + suffix, *axes) for name in self.names]
        if len({tensor.ndim for tensor in tensors}) > 1:
            raise CheckpointError(f'The checkpoint does not tell its network: {suffix[1:]} differs between its stages.')
        return tensors

    def told(self, key: str, *axes: int) -> Tensor:
        """A tensor of one of the numbers of axes."""
        if key not in self.state:
            raise CheckpointError(f'The checkpoint does not tell its network: {key} is missing.')
        shape = tuple(self.state[key].shape)
        if len(shape) not in axes or 0 in shape:
            raise CheckpointError(f'The checkpoint does not tell its network: {key} has the shape {shape}.')
        return self.state[key]


def _facts(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the network that a state in our layout tells, and what else it tells of it."""
    blocks = _Blocks(state)
    facts: dict[str, Any] = dict(
        depths=blocks.depths,
        dims=tuple(weight.shape[1] for weight in blocks.every('.mlp.fc1.weight', 2)),
        num_classes=blocks.told('head.fc.weight', 2).shape[0] if 'head.fc.weight' in state else 0,
        reparameterized=blocks.has('.conv_dw.tall.weight') or blocks.has('.conv_dw.factors'),
        **_geometry_facts(blocks),
    )
    if 'stem.0.weight' in state:
        facts['in_chans'] = blocks.told('stem.0.weight', 4).shape[1]
    if not blocks.has('.gamma') and not facts['reparameterized']:
        facts['ls_init_value'] = None
    if blocks.has('.conv_dw.conv_h.weight'):
        _add_slak_facts(facts, blocks.every('.conv_dw.conv_h.weight', 4))
    elif blocks.has('.conv_dw.weight'):
        kernels = blocks.every('.conv_dw.weight', 4)
        facts.update(family='sw', kernel_size=kernels[0].shape[-1], worked=facts['dims'], groups=())
    elif not blocks.has('.conv_dw.wide.weight'):
        _add_small_kernel_facts(facts, blocks)
    elif blocks.has('.conv_dw.group_mask'):
        _add_merged_facts(facts, blocks)
    else:
        _add_slak_facts(facts, blocks.every('.conv_dw.wide.weight', 4))
    if blocks.has('.se.fc1.weight'):
        facts['family'] = 'sw_v2'
    return facts


def _geometry_facts(blocks: _Blocks) -> dict[str, Any]:
    """What the operators say that they are made for, if they do."""
    told = [_geometry(blocks.state.get(f'{name}.conv_dw.built_for')) for name in blocks.names]
    if not all(told):
        return {}
    lengths, sizes, pads = zip(*told, strict=True)
    # the two policies agree for N = 1 and N = 2
    padding = 'full' if pads[0] == small_padding(sizes[0], 'full') else 'same'
    return dict(kernel_size=sizes[0], focus_lengths=lengths, padding=padding)


def _geometry(table: Tensor | None) -> tuple[int, ...]:
    """M, N and p of a table that holds them; empty for any other."""
    if table is None or table.is_meta or table.is_complex() or table.numel() != 3:
        return ()
    values = table.flatten().double()
    if not values.isfinite().all() or values[:2].min() < 1:
        return ()
    return tuple(int(value) for value in values.tolist())


def _add_slak_facts(facts: dict[str, Any], wide: list[Tensor]) -> None:
    # [C, 1, N, M]; merged kernels of even sides have one row or column more
    size = facts.setdefault('kernel_size', wide[0].shape[-2])
    lengths = facts.setdefault('focus_lengths', tuple(kernel.shape[-1] for kernel in wide))
    facts.update(family='slak', groups=tuple(num_groups(m, size) for m in lengths), worked=facts['dims'])


def _add_small_kernel_facts(facts: dict[str, Any], blocks: _Blocks) -> None:
    """Of operators that hold their small kernels: all that are trained, and merged ones with padding='same'."""
    merged_paths = blocks.has(f'.conv_dw.{MERGED_PATHS}')
    weights = blocks.every(f'.conv_dw.{MERGED_PATHS}' if merged_paths else '.conv_dw.kernels', 4, 5)
    worked, maps = zip(*(weight.shape[-4:-2] for weight in weights), strict=True)
    facts.update(kernel_size=weights[0].shape[-1], worked=worked, groups=maps)
    if weights[0].ndim == 5:
        facts['num_paths'] = weights[0].shape[0]
    if not facts['reparameterized']:
        facts['centre_norm'] = blocks.has('.conv_dw.norm_i.weight')
    # the ablation has one order and one path, and no channel passes through
    is_p_sw = worked == facts['dims'] and facts.get('num_paths', 1) == 1 and not merged_paths
    facts['family'] = 'p_sw' if is_p_sw else 'sw'
    if not blocks.has('.conv_dw.wiring'):
        return
    tables = blocks.every('.conv_dw.wiring', 3)
    facts.update(groups=tuple(table.shape[2] // 2 for table in tables), num_shuffles=tables[0].shape[0])
    picks = [table[:, :, -1] for table in tables if len(table) > 1 and table.shape[2] > 3 and not table.is_meta]
    if picks:  # of one order, or of one group, nothing can be told
        facts['single_centre'] = all(bool((pick == pick[0]).all()) for pick in picks)
    if maps != facts['groups']:
        facts['family'] = 'eq_slak'
    elif max(maps) > 1 and not any(table.is_meta for table in tables):
        facts['family'] = 'p_sw' if all(_is_natural(table[:, :, :table.shape[2] // 2]) for table in tables) else 'sw'


def _add_merged_facts(facts: dict[str, Any], blocks: _Blocks) -> None:
    """Of operators that hold a tall and a wide kernel that are made of small ones."""
    worked, maps = zip(*(mask.shape for mask in blocks.every('.conv_dw.group_mask', 2)), strict=True)
    size = facts.setdefault('kernel_size', blocks.told(f'{blocks.names[0]}.conv_dw.wide.weight', 4).shape[-2])
    groups = tuple(num_groups(length, size) for length in facts.get('focus_lengths', ()))
    is_eq_slak = maps == tuple(2 * count + 1 for count in groups)
    # merged, the ablation is an operator without ghosts like any other
    family = 'eq_slak' if is_eq_slak else 'p_sw' if worked == facts['dims'] else 'sw'
    facts.update(family=family, worked=worked, groups=groups if is_eq_slak else maps)


def _is_natural(table: Tensor) -> bool:
    """Whether every channel's groups [R, C, G] are in natural order."""
    return bool((table == table.new_tensor(range(table.shape[-1]))).all())


def _nearest(family: str, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered network of the family that agrees in most of the arguments that tell its size."""
    if family == 'sw_v2':
        candidates = SHIFTWISE_V2
    else:
        candidates = {name: variant for name, variant in SHIFTWISE.items() if variant['operator'] == family}

    def agreement(variant: dict[str, Any]) -> tuple[bool, ...]:
        same_size = all(variant[name] == facts[name] for name in ('depths', 'dims'))
        # of a ConvNeXt, and of a merged network, the side of its kernels alone tells that it is a grown one
        name = 'centre_norm' if 'centre_norm' in facts else 'kernel_size'
        alike = variant.get(name, True) == facts[name]
        return alike, same_size, variant.get('padding') == facts.get('padding')

    # max takes the first of equals
    name = max(candidates, key=lambda name: agreement(candidates[name]))
    return name, candidates[name]


def _ghost_ratio(dims: tuple[int, ...], worked: tuple[int, ...], rule: str, variant: dict[str, Any]) -> float | None:
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
