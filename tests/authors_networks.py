"""The networks as their authors lay them out, written from their description in a few lines of plain PyTorch.

They share no code with the package: wiring from the seeds, large kernels put together from the small ones.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 123


@dataclass(frozen=True)
class AuthorsNetwork:
    """A network of kind ``'slak'``, ``'sw'`` or ``'sw_v2'``."""
    kind: str
    depths: tuple[int, ...] = (1, 2, 1, 1)
    dims: tuple[int, ...] = (12, 16, 24, 32)
    lengths: tuple[int, ...] = (15, 13, 11, 7)
    size: int = 5
    paths: int = 2
    shuffles: int = 4
    ghost_ratio: float = 0.23
    classes: int = 10
    in_chans: int = 3

    def model_args(self) -> dict[str, Any]:
        """The same network as arguments of ``timm.create_model``."""
        args: dict[str, Any] = dict(
            depths=self.depths,
            dims=self.dims,
            focus_lengths=self.lengths,
            kernel_size=self.size,
            num_classes=self.classes,
            in_chans=self.in_chans,
        )
        if self.kind != 'slak':
            args.update(num_paths=self.paths, num_shuffles=self.shuffles, ghost_ratio=self.ghost_ratio)
        return args

    def split(self, dim: int) -> tuple[list[int], list[int]]:
        """Worked-on and ghost channels."""
        if self.kind == 'sw_v2':
            ghosts = dim - int(dim * (1 - self.ghost_ratio)) // 2 * 2
        else:
            ghosts = int(dim * self.ghost_ratio)
        ghost = sorted(np.random.RandomState(SEED).choice(dim, ghosts, replace=False).tolist())
        return [c for c in range(dim) if c not in ghost], ghost

    def groups(self, stage: int) -> int:
        return -(-self.lengths[stage] // self.size)

    def state(self, pruned: float = 0., merged: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """A state dict of random weights; a share of the groups is zero on all paths."""
        draw = torch.Generator().manual_seed(seed)
        state: dict[str, Tensor] = {}

        def normal(key: str, *shape: int, std: float = 0.5) -> None:
            state[key] = std * torch.randn(shape, generator=draw)

        def layer(key: str, *shape: int, bias: bool = True) -> None:
            normal(f'{key}.weight', *shape, std=(1 / np.prod(shape[1:])) ** 0.5)
            if bias:
                normal(f'{key}.bias', shape[0], std=0.1)

        def norm(key: str, channels: int, batch: bool = False) -> None:
            state[f'{key}.weight'] = 0.5 + torch.rand(channels, generator=draw)
            normal(f'{key}.bias', channels, std=0.2)
            if batch:
                normal(f'{key}.running_mean', channels, std=0.2)
                state[f'{key}.running_var'] = 0.5 + torch.rand(channels, generator=draw)
                state[f'{key}.num_batches_tracked'] = torch.tensor(7)

        v2 = self.kind == 'sw_v2'
        for i, dim in enumerate(self.dims):
            before = self.dims[i - 1] if i else self.in_chans
            name = f'downsample_layers.{i}'
            if i == 0 and v2:
                layer(f'{name}.0', dim // 2, before, 3, 3)
                norm(f'{name}.1', dim // 2)
                layer(f'{name}.3', dim, dim // 2, 3, 3)
                norm(f'{name}.4', dim)
            elif i == 0:
                layer(f'{name}.0', dim, before, 4, 4)
                norm(f'{name}.1', dim)
            elif v2:
                layer(f'{name}.0', dim, before, 3, 3)
                norm(f'{name}.1', dim)
            else:
                norm(f'{name}.0', before)
                layer(f'{name}.1', dim, before, 2, 2)
            for j in range(self.depths[i]):
                name, length = f'stages.{i}.{j}', self.lengths[i]
                normal(f'{name}.gamma', dim, std=0.1)  # the deep networks magnify rounding at five times as much
                kernels = f'{name}.large_kernel'
                if self.kind == 'slak':
                    layer(f'{kernels}.LoRA1.conv', dim, 1, length, self.size, bias=False)
                    norm(f'{kernels}.LoRA1.bn', dim, batch=True)
                    layer(f'{kernels}.LoRA2.conv', dim, 1, self.size, length, bias=False)
                    norm(f'{kernels}.LoRA2.bn', dim, batch=True)
                    layer(f'{kernels}.small_conv.conv', dim, 1, self.size, self.size, bias=False)
                    norm(f'{kernels}.small_conv.bn', dim, batch=True)
                else:
                    worked = len(self.split(dim)[0])
                    rows = worked * self.groups(i)
                    kept = (torch.rand(rows, 1, 1, 1, generator=draw) >= pruned).float()
                    for p in range(self.paths):
                        normal(f'{kernels}.LoRAs.{p}.weight', rows, 1, self.size, self.size, std=0.1)
                        state[f'{kernels}.LoRAs.{p}.weight'] *= kept
                    for branch in ('lora1', 'lora2', 'small'):
                        norm(f'{kernels}.bn_{branch}', worked, batch=True)
                norm(f'{name}.norm', dim, batch=v2)
                if v2:
                    layer(f'{name}.se.down', dim // 4, dim, 1, 1)
                    layer(f'{name}.se.up', dim, dim // 4, 1, 1)
                    layer(f'{name}.pwconv1.1', 4 * dim, dim)
                    normal(f'{name}.act.1.gamma', 1, 1, 1, 4 * dim)
                    normal(f'{name}.act.1.beta', 1, 1, 1, 4 * dim)
                    layer(f'{name}.pwconv2.0', dim, 4 * dim, bias=False)
                    norm(f'{name}.pwconv2.2', dim, batch=True)
                else:
                    layer(f'{name}.pwconv1', 4 * dim, dim)
                    layer(f'{name}.pwconv2', dim, 4 * dim)
        norm('norm', self.dims[-1])
        layer('head', self.classes, self.dims[-1])
        return self.merged(state) if merged else state

    def merged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights after the authors' merge of the paths."""
        out: dict[str, Tensor] = {}
        for key, value in state.items():
            name, lora, _ = key.partition('.LoRAs.')
            if lora:
                out[f'{name}.LoRA.weight'] = out.get(f'{name}.LoRA.weight', 0) + value
            else:
                out[key] = value
        return out

    def features(self, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """The output of each stage."""
        outs = []
        for i, depth in enumerate(self.depths):
            x = self._downsample(state, f'downsample_layers.{i}', x, i)
            for j in range(depth):
                x = x + self._block(state, f'stages.{i}.{j}', x, i)
            outs.append(x)
        return outs

    def logits(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        pooled = self.features(state, x)[-1].mean((2, 3))
        pooled = F.layer_norm(pooled, pooled.shape[1:], state['norm.weight'], state['norm.bias'], 1e-6)
        return F.linear(pooled, state['head.weight'], state['head.bias'])

    def _downsample(self, state, name, x, i):
        def conv(x, entry, stride, padding):
            return F.conv2d(x, state[f'{name}.{entry}.weight'], state[f'{name}.{entry}.bias'], stride, padding)

        def norm(x, entry):
            weight, bias = state[f'{name}.{entry}.weight'], state[f'{name}.{entry}.bias']
            return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)

        if self.kind == 'sw_v2':
            x = norm(conv(x, 0, 2, 1), 1)
            return norm(conv(F.gelu(x), 3, 2, 1), 4) if i == 0 else x
        return norm(conv(x, 0, 4, 0), 1) if i == 0 else conv(norm(x, 0), 1, 2, 0)

    def _block(self, state, name, x, i):
        def linear(x, entry):
            return F.linear(x, state[f'{name}.{entry}.weight'], state.get(f'{name}.{entry}.bias'))

        x = self._operator(state, f'{name}.large_kernel', x, i)
        if self.kind == 'sw_v2':
            x = batch_norm(state, f'{name}.norm', x)
            gate = x.mean((2, 3))[:, :, None, None]
            gate = F.relu(F.conv2d(gate, state[f'{name}.se.down.weight'], state[f'{name}.se.down.bias']))
            gate = F.conv2d(gate, state[f'{name}.se.up.weight'], state[f'{name}.se.up.bias']).sigmoid()
            x = F.gelu(linear((x * gate).permute(0, 2, 3, 1), 'pwconv1.1'))
            response = x.square().sum((1, 2), keepdim=True).sqrt()
            response = response / (response.mean(-1, keepdim=True) + 1e-6)
            x = (state[f'{name}.act.1.gamma'] * response + 1) * x + state[f'{name}.act.1.beta']
            x = batch_norm(state, f'{name}.pwconv2.2', linear(x, 'pwconv2.0').permute(0, 3, 1, 2))
        else:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, x.shape[3:], state[f'{name}.norm.weight'], state[f'{name}.norm.bias'], 1e-6)
            x = linear(F.gelu(linear(x, 'pwconv1')), 'pwconv2').permute(0, 3, 1, 2)
        return state[f'{name}.gamma'][:, None, None] * x

    def _operator(self, state, name, x, i):
        length, size, groups = self.lengths[i], self.size, self.groups(i)
        across, along, centre = (size // 2, length // 2), (length // 2, size // 2), (size // 2, size // 2)
        if self.kind == 'slak':
            wide, tall, square = (
                state[f'{name}.{part}.conv.weight'].squeeze(1) for part in ('LoRA2', 'LoRA1', 'small_conv'))
            h, v, s = (
                large_kernel(x, kernel, *middle)
                for kernel, middle in ((wide, across), (tall, along), (square, centre)))
            return (
                batch_norm(state, f'{name}.LoRA2.bn', h) + batch_norm(state, f'{name}.LoRA1.bn', v)
                + batch_norm(state, f'{name}.small_conv.bn', s)
            )
        kept, ghost = self.split(x.shape[1])
        weight = sum(value for key, value in state.items() if key.startswith(f'{name}.LoRA'))
        small = weight.view(len(kept), groups, size, size)
        horizontal, vertical, picks = orders(len(kept), groups, self.shuffles)
        channel = torch.arange(len(kept))
        # the group at each place, pasted where the place is: [C, G, N, N] -> [C, N, G * N] and [C, G * N, N]
        wide = sum(small[channel[:, None], order].transpose(1, 2).flatten(2) for order in horizontal)
        tall = sum(small[channel[:, None], order].flatten(1, 2) for order in vertical)
        square = sum(small[channel, pick] for pick in picks)
        worked = x[:, kept]
        h, v, s = (
            large_kernel(worked, kernel, *middle)
            for kernel, middle in ((wide, across), (tall, along), (square, centre)))
        out = (
            batch_norm(state, f'{name}.bn_lora1', h) + batch_norm(state, f'{name}.bn_lora2', v)
            + batch_norm(state, f'{name}.bn_small', s)
        )
        return torch.cat([out + worked, x[:, ghost]], dim=1)


@lru_cache
def orders(channels: int, groups: int, shuffles: int) -> tuple[Tensor, Tensor, Tensor]:
    """The group at each place of the horizontal and of the vertical branch, and that of the identity branch."""
    draw = torch.Generator().manual_seed(SEED)

    def permutations() -> Tensor:
        rows = [torch.randperm(groups, generator=draw) for _ in range(shuffles) for _ in range(channels)]
        return torch.stack(rows).view(shuffles, channels, groups)

    horizontal, vertical = permutations(), permutations()
    picks = torch.stack([torch.randint(0, groups, [channels], generator=draw) for _ in range(shuffles)])
    return horizontal, vertical, picks


def large_kernel(x: Tensor, kernel: Tensor, row: int, column: int) -> Tensor:
    """Depthwise convolution, kernels [C, rows, columns], whose entry (row, column) lies over the output's position."""
    _, rows, columns = kernel.shape
    x = F.pad(x, (column, columns - 1 - column, row, rows - 1 - row))
    return F.conv2d(x, kernel[:, None], groups=len(kernel))


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, *(state[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')), eps=1e-5)
