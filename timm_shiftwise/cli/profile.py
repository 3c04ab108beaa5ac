"""`timm-shiftwise profile MODEL`: what a network costs, beside the same network with SLaK's large kernels."""
import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, cast

from rich import box
from rich.markup import escape
from rich.table import Table

from ..profile.kept import percent
from . import CommandError
from .network import (
    add_format,
    add_model_kwargs,
    build_network,
    in_one_cell,
    is_elsewhere,
    load_network,
    path_shares,
    print_csv,
    print_json,
    print_sections,
)

if TYPE_CHECKING:
    from ..models import ShiftwiseNet
    from ..profile import Comparison, NetworkProfile
    from ..profile.estimate import Estimate
    from ..profile.timing import StageTime

_CALM = 1.5
"""How far apart the quartiles of an operator's times may lie."""


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'profile',
        help="count and time what a network costs, beside SLaK's large kernels",
        usage='%(prog)s MODEL [--checkpoint FILE | --pretrained | --sparsity SHARE ...] [--time] [--on GPU] [OPTIONS]',
        description='Count the parameters and multiply-adds of a network, stage by stage, its depthwise part and the '
                    "whole, beside the same network with SLaK's large kernels as its operators (arXiv 2401.12736, "
                    'Tables 2 and 4, Eq. 4-8). Ratios say how many times as much SLaK takes.',
    )
    parser.add_argument(
        'model', metavar='MODEL', help='name of the network, hf-hub:USER/NAME, or local-dir:FOLDER')
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument('--checkpoint', metavar='FILE', help='count the groups that this checkpoint keeps')
    groups.add_argument('--pretrained', action='store_true', help='count the groups that the published weights keep')
    groups.add_argument(
        '--sparsity', metavar='SHARE', nargs='+', type=float,
        help='count with this share of the groups pruned, or with one share for each stage')
    add_model_kwargs(parser)
    parser.add_argument(
        '--img-size', metavar='PIXELS', nargs='+', type=int, help='side of the image, or height and width')
    add_format(parser)
    parser.add_argument('--device', default='cpu', help='where the network runs (%(default)s)')
    timing = parser.add_argument_group('timing')
    timing.add_argument(
        '--time', action='store_true',
        help="time each stage's operator beside SLaK's at several densities, forward (Table 5)")
    timing.add_argument(
        '--densities', metavar='SHARE', nargs='+', type=float, help='kept shares to time (1.0, 0.9 and so on to 0.1)')
    timing.add_argument('--batch-size', type=int, help='images in a batch (1; 128 for --on)')
    timing.add_argument('--repeats', type=int, default=10, help='turns, of which the median counts (%(default)s)')
    estimate = parser.add_argument_group('estimate')
    estimate.add_argument(
        '--on', metavar='GPU', help='estimate a training step and inference on a GPU that is not here: a100, h100, ...')
    estimate.add_argument('--dtype', help='what the whole network is in for --on: bfloat16 (default), float16, float32')


def run(args: argparse.Namespace) -> int:
    """Count, time if asked for, and print."""
    import torch

    from ..ops.measured import CHOICES
    from ..profile import profile_model
    from ..profile.estimate import estimate_model
    from ..profile.timing import DENSITIES, time_operators

    if args.densities and not args.time:
        raise CommandError('--densities says what --time measures: give both')
    if args.dtype and not args.on:
        raise CommandError('--dtype says what --on estimates: give both')
    batch_size = 1 if args.batch_size is None else args.batch_size
    network, source = _network(args)
    try:
        profile = dataclasses.replace(
            profile_model(network, sparsity=args.sparsity, img_size=args.img_size, device=args.device),
            model=args.model,
        )
        times: list[StageTime] = []
        if args.time:
            sizes = [(stage.height, stage.width) for stage in profile.stages]
            times += time_operators(
                network, sizes, densities=args.densities or DENSITIES, batch_size=batch_size,
                repeats=args.repeats, device=args.device)
        estimate = None if args.on is None else estimate_model(
            network, args.on, batch_size=128 if args.batch_size is None else args.batch_size,
            dtype=args.dtype or 'bfloat16', img_size=args.img_size)
        timed_ways = CHOICES.records()
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    setting = {
        'device': args.device, 'threads': torch.get_num_threads(), 'batch_size': batch_size,
        'repeats': args.repeats,
    }
    if args.format == 'json':
        timed = {'times': {**setting, 'stages': [dataclasses.asdict(stage) for stage in times]}} if times else {}
        estimated = {'estimated': dataclasses.asdict(estimate)} if estimate else {}
        print_json({**profile.to_dict(), 'timed_ways': timed_ways, **timed, **estimated})
    elif args.format == 'csv':
        print_csv(_rows(profile, times, estimate))
    else:
        print_sections(
            _summary(profile, source), _depthwise_section(profile), _whole_section(profile), _way_section(profile),
            *([_timed_ways_section(timed_ways)] if timed_ways else []),
            *([_time_section(times, setting)] if times else []),
            *([_estimate_section(profile, estimate)] if estimate else []))
    return 0


def _network(args: argparse.Namespace) -> 'tuple[ShiftwiseNet, str]':
    """The network, and where its share of kept groups is from, for people."""
    kwargs = dict(args.model_kwargs)
    if args.checkpoint is not None:
        network, _ = load_network(args.checkpoint, args.model, kwargs)
        return network, f'as {args.checkpoint} keeps them'
    if args.pretrained or (is_elsewhere(args.model) and args.sparsity is None):
        return build_network(args.model, pretrained=True, **kwargs), 'as its weights keep them'
    if not args.time:
        network = build_network(args.model, device='meta', **kwargs)
    elif kwargs.pop('reparameterized', False):
        from timm.utils import reparameterize_model
        # built merged, a network holds zeros until it is given weights
        network = cast('ShiftwiseNet', reparameterize_model(build_network(args.model, **kwargs)))
    else:
        network = build_network(args.model, **kwargs)
    if args.sparsity is not None:
        return network, 'as asked for'
    trained = getattr(network.sparsity, 'sparsity', 0)
    advice = f'; it is trained to keep {100 * (1 - trained):.0f} %: --sparsity {trained}' if trained else ''
    return network, f'as built{advice}'


def _summary(profile: 'NetworkProfile', source: str) -> list[Table | str]:
    ours, slak = profile.whole.ours, profile.whole.slak
    paths = f', by the paths {path_shares(profile)}' if profile.has_paths_apart else ''
    return [
        f'[bold]{escape(profile.model)}[/] on {profile.height} x {profile.width} pixels, N = {profile.kernel_size}: '
        f'{ours.parameters:,} parameters, {_short(ours.multiply_adds)} multiply-adds an image.',
        f'SLaK of the same width: {slak.parameters:,} parameters, {_short(slak.multiply_adds)} multiply-adds.',
        f'{percent(profile.density)} of the groups kept ({profile.kept:,} of {profile.total:,}){paths}, '
        f'{escape(source)}.'
        if profile.total else 'It is made of large kernels, which have no groups.',
    ]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify='right', no_wrap=True)
    return table


def _depthwise_section(profile: 'NetworkProfile') -> list[Table | str]:
    apart = profile.has_paths_apart
    table = _table(
        'stage', 'channels', 'M', 'G', 'map', 'kept', *(['by the\npaths'] if apart else []), 'per\nchannel',
        'para-\nmeters', '\nSLaK', '\nratio', 'multiply-\nadds', '\nSLaK', '\nratio', 'addi-\ntions')
    for stage in profile.stages:
        ghosts = f' of {stage.dim}' if stage.dim > stage.channels else ''
        table.add_row(
            str(stage.stage), f'{stage.channels}{ghosts}', str(stage.focus_length), str(stage.groups),
            f'{stage.height} x {stage.width}', percent(stage.density) if stage.total else '',
            *([path_shares(stage)] if apart else []),
            f'{stage.kernel_ratio:.2f}', *_depthwise_cells(stage.depthwise), end_section=stage is profile.stages[-1])
    table.add_row(
        'all', *[''] * 4, percent(profile.density) if profile.total else '',
        *([path_shares(profile)] if apart else []), '', *_depthwise_cells(profile.depthwise),
        style='bold')
    counted = ''
    if profile.depthwise.ours.additions:
        counted = 'Multiply-adds: of small kernels, whichever way computes them. Additions: of shifted maps, besides.'
    elif profile.merged:
        counted = 'Multiply-adds: of the tall and the wide kernel that the operator was merged to.'
    return [
        "[bold]Depthwise part[/] (ratios: SLaK's to ours)", table,
        'Parameters: kept groups, paths summed; of SLaK 2 M N a channel. Per channel: 2 M N / (G N N), none pruned.',
        *([counted] if counted else []),
    ]


def _depthwise_cells(cost: 'Comparison') -> list[str]:
    return [
        _short(cost.ours.kept_parameters), _short(cost.slak.kept_parameters), f'{cost.parameter_ratio:.2f}',
        _short(cost.ours.multiply_adds), _short(cost.slak.multiply_adds), f'{cost.multiply_add_ratio:.2f}',
        _short(cost.ours.additions),
    ]


def _whole_section(profile: 'NetworkProfile') -> list[Table | str]:
    table = _table('part', 'held', 'SLaK', 'kept', 'SLaK', 'ratio', 'multiply-\nadds', '\nSLaK', '\nratio')
    table.columns[0].justify = 'left'
    for name, cost in _parts(profile):
        table.add_row(
            name, _short(cost.ours.parameters), _short(cost.slak.parameters), _short(cost.ours.kept_parameters),
            _short(cost.slak.kept_parameters), f'{cost.parameter_ratio:.2f}', _short(cost.ours.multiply_adds),
            _short(cost.slak.multiply_adds), f'{cost.multiply_add_ratio:.2f}',
            style='bold' if name == 'total' else '', end_section=name == 'head')
    return [
        "[bold]Whole network[/] (ratios: SLaK's to ours)", table,
        'Held: all parameters, of all paths and of pruned groups too. Kept: paths summed, pruned groups left out.',
    ]


def _way_section(profile: 'NetworkProfile') -> list[Table | str]:
    table = _table('stage')
    table.add_column('way')
    table.add_column('why')
    for stage in profile.stages:
        table.add_row(str(stage.stage), stage.way.name, escape(stage.way.reason))
    return ['[bold]How the operators run at inference[/]', table]


def _timed_ways_section(records: list[dict[str, Any]]) -> list[Table | str]:
    """The choices that were timed, by this process or by the one that wrote the file which the environment names."""
    table = _table('direction', 'device', 'dtype', 'padding', 'B x C x H x W', 'M', 'N', 'fastest', 'ms', 'slowest, ms')
    for record in records:
        taken = record['milliseconds'].values()
        fastest = (record['way'], f'{min(taken):.3f}', f'{max(taken):.3f}') if taken else ('no memory', '', '')
        table.add_row(
            *(record[name] for name in ('direction', 'device', 'dtype', 'padding')),
            ' x '.join(str(record[name]) for name in ('batch', 'channels', 'height', 'width')),
            str(record['focus_length']), str(record['kernel_size']), *fastest)
    return ['[bold]Ways that were timed[/] (in training, and merged)', table]


def _time_section(times: 'list[StageTime]', setting: dict[str, Any]) -> list[Table | str]:
    table = _table('stage', 'SLaK, ms', *(f'{100 * timed.density:g} %' for timed in times[0].operators))
    for stage in times:
        table.add_row(
            str(stage.stage), f'{stage.large_kernel_milliseconds:.2f}',
            *(f'{timed.ratio:.2f}' for timed in stage.operators))
    lines: list[Table | str] = [
        "[bold]Time of SLaK's operator in times of ours, by kept share[/]", table,
        f'Medians of {setting["repeats"]} turns, forward, batch {setting["batch_size"]}, on {setting["device"]}, '
        f'threads: {setting["threads"]}.',
    ]
    spread = max(stage.spread for stage in times)
    if spread > _CALM:
        lines.append(
            f'[yellow]Not to be trusted:[/] the middle half of an operator\'s times spans a factor of {spread:.1f}. '
            'Something else ran on the machine: stop that, or raise --repeats.')
    return lines


def _estimate_section(profile: 'NetworkProfile', estimate: 'Estimate') -> list[Table | str]:
    operators: list[Table | str] = []
    if estimate.stages:
        table = _table('stage', 'layers', 'way', *estimate.stages[0].ways_ms)
        for stage in estimate.stages:
            table.add_row(
                str(stage.stage), str(stage.layers), stage.way, *(f'{ms:.1f}' for ms in stage.ways_ms.values()))
        operators += [
            table, 'Operators of a stage together, forward and backward, estimated ms by the ways there are.']
    networks = _table(
        'network', 'estimated\nstep, ms', 'estimated\nimages/s', 'estimated infer-\nence, ms an image')
    networks.columns[0].justify = 'left'
    for name, times in ((profile.model, estimate.ours), (estimate.baseline_model, estimate.baseline)):
        step = ('', '') if times.step_ms is None else (
            f'{times.step_ms:.0f}', f'{1000 * estimate.batch_size / times.step_ms:.0f}')
        networks.add_row(name, *step, f'{times.image_ms:.3f}')
    return [
        f'[bold]Estimated, not measured[/]: {estimate.on}, batch {estimate.batch_size}, all in {estimate.dtype}',
        *operators, networks,
        'Step: forward and backward, without the optimiser. Inference: merged, the whole batch at once.',
        f'Assumed: {estimate.assumptions}.',
    ]


def _parts(profile: 'NetworkProfile') -> 'list[tuple[str, Comparison]]':
    stages = [(f'stage {stage.stage}', stage.whole) for stage in profile.stages]
    return [('stem', profile.stem), *stages, ('head', profile.head), ('total', profile.whole)]


def _rows(
        profile: 'NetworkProfile', times: 'list[StageTime]', estimate: 'Estimate | None') -> list[dict[str, Any]]:
    """A row for each part of the network, and for all; a part has no value in columns that are not for it."""
    rows = []
    for name, cost in _parts(profile):
        row: dict[str, Any] = dict.fromkeys(('part', *_FACTS, *_cost_values('depthwise', profile.depthwise)), '')
        row.update(part=name, **_cost_values('whole', cost), way='', way_reason='')
        rows.append(row)
    for row, stage in zip(rows[1:], profile.stages, strict=False):
        row.update({fact: getattr(stage, fact) for fact in _FACTS}, **_cost_values('depthwise', stage.depthwise))
        row.update(path_densities=in_one_cell(stage.path_densities))
        row.update(way=stage.way.name, way_reason=stage.way.reason)
    rows[-1].update(
        kept=profile.kept, total=profile.total, density=profile.density,
        path_densities=in_one_cell(profile.path_densities), **_cost_values('depthwise', profile.depthwise))
    for row, timed in zip(rows[1:], times, strict=False):
        row['large_kernel_milliseconds'] = timed.large_kernel_milliseconds
        for operator in timed.operators:
            row[f'milliseconds_at_{operator.density:g}'] = operator.milliseconds
            row[f'time_ratio_at_{operator.density:g}'] = operator.ratio
    if estimate is not None:
        for row, operators in zip(rows[1:], estimate.stages, strict=False):
            row.update({f'estimated_{way}_ms': ms for way, ms in operators.ways_ms.items()})
        for name, whole in (('', estimate.ours), (f'{estimate.baseline_model}_', estimate.baseline)):
            rows[-1].update({f'estimated_{name}{key}': ms for key, ms in dataclasses.asdict(whole).items()})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, '') for name in columns} for row in rows]


_FACTS = (
    'blocks', 'dim', 'channels', 'focus_length', 'groups', 'height', 'width', 'kept', 'total', 'density',
    'path_densities', 'kernel_ratio',
)


def _cost_values(scope: str, cost: 'Comparison') -> dict[str, Any]:
    return {
        **{f'{scope}_{side}_{name}': value for side, held in dataclasses.asdict(cost).items()
           for name, value in held.items()},
        f'{scope}_parameter_ratio': cost.parameter_ratio,
        f'{scope}_multiply_add_ratio': cost.multiply_add_ratio,
    }


def _short(count: int) -> str:
    """A count with three digits and a unit."""
    value = float(count)
    for unit in ('', ' k', ' M', ' G', ' T'):
        if value < 999.5 or unit == ' T':
            break
        value /= 1000
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f'{value:.{digits}f}{unit}'
