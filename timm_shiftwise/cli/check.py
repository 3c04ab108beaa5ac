"""`timm-shiftwise check --device cuda`: whether all runs, is right and is fast here, in one report to send back."""
import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from . import CommandError
from .network import build_network
from .output import writing

if TYPE_CHECKING:
    import torch

    from ..profile.check import Finding


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'check',
        help='check on a device that every way is right, and time a network; one report to send back',
        description='Compare every way to compute the operator with its definition, train, compile and merge a '
                    'network, time it beside convnext_tiny, and tell which ways are taken. The exit status is 1 if '
                    'anything is wrong.',
    )
    parser.add_argument('--device', default='cuda', help='where to run: cuda, cuda:1, xpu, mps, cpu (%(default)s)')
    parser.add_argument('--model', metavar='NAME', default='sw_tiny', help='the network (%(default)s)')
    parser.add_argument('--batch-size', type=int, help='images in a batch when it is timed (128; 4 on the CPU)')
    parser.add_argument('--quick', action='store_true', help='fewer shapes and runs, and no code from inductor')
    parser.add_argument('--output', metavar='FILE', help='write the report into this file, too')


def run(args: argparse.Namespace) -> int:
    """Check, print line by line, and keep the report's file whole after every line."""
    from ..ops.files import replacing
    from ..profile.check import Setting, check_device

    device = _device(args.device)
    build_network(args.model, device='meta')  # or an error that says what there is
    batch_size = (4 if device.type == 'cpu' else 128) if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise CommandError(f'--batch-size must be at least 1, got {batch_size}')
    console = Console(soft_wrap=True)
    lines: list[str] = []
    findings: list[Finding] = []
    for finding in check_device(Setting(device, args.model, batch_size, args.quick)):
        new = [] if findings and findings[-1].section == finding.section else ['', finding.section.upper()]
        findings.append(finding)
        new.append(f'{_verdict(finding)}  {finding.what}: {finding.said}')
        lines += new
        console.out('\n'.join(new), highlight=False)
        if args.output is not None:
            with writing(args.output), replacing(args.output) as partial:
                partial.write_text('\n'.join([*lines[1:], '', _summary(findings), '']), encoding='utf-8')
    console.out(f'\n{_summary(findings)}', highlight=False)
    return 1 if any(finding.good is False for finding in findings) else 0


def _device(name: str) -> 'torch.device':
    """The device, which tensors can be made on.

    Raises:
        CommandError: there is none of that name here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch without CUDA, too
        raise CommandError(f'nothing can be run on --device {name!r} here: {error}') from error
    return device


def _verdict(finding: 'Finding') -> str:
    return {True: 'ok   ', False: 'WRONG', None: '     '}[finding.good]


def _summary(findings: 'Sequence[Finding]') -> str:
    good, wrong = (sum(finding.good is wanted for finding in findings) for wanted in (True, False))
    return f'{good} checks passed, {wrong} failed.'
