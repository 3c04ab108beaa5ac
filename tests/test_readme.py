"""What the documents say: their code and commands run, the files they name are there, their numbers were measured."""
import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from authors_networks import AuthorsNetwork
from hub_server import connected
from safetensors.torch import save
from usage_code import code_blocks

from timm_shiftwise.cli import COMMANDS as COMMANDS_OF_THE_PACKAGE
from timm_shiftwise.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'timm_shiftwise'
RESULTS = ROOT / 'benchmarks' / 'results'
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for path in (*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'benchmarks' / 'README.md')}
README = DOCUMENTS['README.md']
MOST_WORDS = 1300
FILES_OF_OTHERS = ('config.json', 'masks.png', 'summary.csv', 'train.py')
NAMES_OF_OTHERS = ('BatchNorm2d',)
COMMANDS = [
    line.strip() for block in code_blocks(README, 'sh') for line in block.splitlines()
    if line.strip() and not line.startswith('#')]
SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

each_document = pytest.mark.parametrize('name', DOCUMENTS)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IMAGES)


def words_after(command: str, start: str) -> list[str]:
    """Arguments of a command."""
    return shlex.split(command.partition(start)[2])


def test_every_block_is_of_a_kind_that_a_test_reads():
    languages = re.findall(r'^```(\w+)$', README, re.MULTILINE)
    assert languages.count('python') == 2 and set(languages) == {'python', 'sh', 'bibtex'}
    starts = 'python3 -m venv', 'torchrun', 'timm-shiftwise'
    assert all(command.startswith(starts) for command in COMMANDS)


@pytest.mark.slow
def test_the_first_code_runs_with_its_comments_taken_away(tmp_path, monkeypatch):
    code = re.sub('^# model', 'model', code_blocks(README)[0], flags=re.MULTILINE)
    network = timm.create_model('sw_tiny')
    weights, convnext = save(network.state_dict()), timm.create_model('convnext_tiny')
    config = b'{"architecture": "sw_tiny", "num_classes": 1000, "model_args": {}, "pretrained_cfg": {}}'
    seen = []
    with connected(tmp_path, monkeypatch) as hub:
        hub.add('timm/convnext_tiny.in12k_ft_in1k', {'model.safetensors': save(convnext.state_dict())})
        hub.add('you/your_sw', {'model.safetensors': weights, 'config.json': config})
        create = timm.create_model
        monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: seen.append(create(*args, **kwargs)))
        exec(code, {})
    assert [model.num_classes for model in seen] == [1000, 10, 10, 1000]
    torch.testing.assert_close(logits(seen[0]), logits(convnext), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(seen[3]), logits(network))


@pytest.mark.slow
def test_the_code_for_the_authors_checkpoints_runs_and_gives_their_logits(tmp_path, monkeypatch):
    sizes = dict(lengths=(51, 49, 47, 13), classes=1000)
    slak = AuthorsNetwork('slak', depths=(3, 3, 9, 3), dims=(124, 249, 499, 998), size=5, **sizes)
    shiftwise = AuthorsNetwork('sw_v2', depths=(3, 3, 18, 3), dims=(80, 160, 320, 640), size=3, **sizes)
    torch.save({'model': slak.state()}, tmp_path / 'their_slak_tiny.pth')
    torch.save({'model': shiftwise.state(pruned=0.3)}, tmp_path / 'their_sw_tiny.pth')
    monkeypatch.chdir(tmp_path)
    networks = iter([slak, slak, shiftwise])
    for line in code_blocks(README)[1].splitlines():
        names = {'timm': timm}
        exec(line, names)
        network = next(networks)
        wanted = network.logits(network.state(pruned=0. if network is slak else 0.3), IMAGES)
        torch.testing.assert_close(logits(names['model']), wanted, rtol=1e-4, atol=1e-4)
    assert not list(networks)


@pytest.mark.slow
def test_a_training_run_is_converted_and_published_by_the_lines_given(tmp_path, monkeypatch):
    convert, publish = (
        next(command for command in COMMANDS if command.startswith(f'timm-shiftwise {name}'))
        for name in ('convert', 'publish'))
    run = tmp_path / words_after(convert, 'timm-shiftwise ')[1]
    run.mkdir(parents=True)
    network = timm.create_model('sw_tiny')
    torch.save({'state_dict': network.state_dict(), 'arch': 'sw_tiny'}, run / 'model_best.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='sw_tiny', epochs=300)))
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path, monkeypatch) as hub:
        hub.tokens['secret'] = 'you'
        monkeypatch.setenv('HF_TOKEN', 'secret')
        for command in (convert, publish):
            assert main(words_after(command, 'timm-shiftwise ')) == 0
        repository, = hub.repositories
        assert torch.equal(logits(timm.create_model(f'hf-hub:{repository}', pretrained=True)), logits(network))


def test_the_recipe_is_written_by_the_line_given(tmp_path, monkeypatch, capsys):
    command, = (command for command in COMMANDS if command.startswith('timm-shiftwise recipe'))
    words = words_after(command, 'timm-shiftwise ')
    for folder in ('train/a', 'train/b', 'val/a', 'val/b'):
        (tmp_path / 'imagenet' / folder).mkdir(parents=True)
        for index in range(20):
            (tmp_path / 'imagenet' / folder / f'{index}.png').touch()
    monkeypatch.chdir(tmp_path)
    assert main([word.replace('/path/to/', '') for word in words]) == 0
    file = capsys.readouterr().out.strip()
    recipe = yaml.safe_load(Path(file).read_text())
    assert recipe['model'] == words[1] and recipe['data_dir'] == 'imagenet'
    assert f'torchrun --nproc_per_node=8 -m timm_shiftwise run train.py --config {file}' in README


@pytest.mark.slow
@pytest.mark.parametrize('command', [command for command in COMMANDS if re.search(r'(train|validate)\.py', command)])
def test_timms_scripts_know_the_arguments_given(command):
    if not (SCRIPTS / 'train.py').is_file():
        pytest.skip("train.py is not in timm's wheel: set TIMM_SCRIPTS to the directory that holds it")
    name = re.search(r'\w+\.py', command)[0]
    words = words_after(command.replace('...', 'PLACE'), f'{name} ')
    if '--config' in words:  # which train.py reads with a parser of its own
        at = words.index('--config')
        recipe = next(other for other in COMMANDS if other.startswith('timm-shiftwise recipe'))
        assert words_after(recipe, 'recipe ')[0] == words[at + 1].removesuffix('.yaml')
        del words[at:at + 2]
    runpy.run_path(str(SCRIPTS / name), run_name=name)['parser'].parse_args(words)


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize('command', COMMANDS_OF_THE_PACKAGE)
def test_every_command_has_a_line(command):
    assert re.search(rf'`{command}`|timm-shiftwise {command}\b', README)


@pytest.mark.slow
@pytest.mark.parametrize('code', [
    pytest.param(code, id=f'{name}-{number}')
    for name, text in DOCUMENTS.items() if name != 'README.md' for number, code in enumerate(code_blocks(text))])
def test_the_code_of_every_other_document_runs(code, tmp_path):
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert run.returncode == 0, run.stderr


@each_document
def test_every_link_leads_somewhere(name):
    targets = [target.partition('#')[0] for target in re.findall(r'\]\(([^)\s]+)\)', DOCUMENTS[name])]
    folder = (ROOT / name).parent
    assert [target for target in targets if not target.startswith('https://') and not (folder / target).exists()] == []


@pytest.mark.parametrize('name', [name for name in DOCUMENTS if name != 'CHANGELOG.md'])  # it tells of what is gone
def test_every_file_and_folder_named_is_there(name):
    words = [word for code in re.findall(r'`([^`\n]+)`', DOCUMENTS[name]) for word in code.split()]
    path = r'([\w.-]+/)+|([\w.-]+/)*[\w.-]+\.(py|md|csv|png|cff|cfg|toml)'
    named = [word for word in words if re.fullmatch(path, word)]
    folders = (ROOT, PACKAGE, (ROOT / name).parent, RESULTS)
    missing = {word for word in named if not any((folder / word).exists() for folder in folders)}
    missing = {word for word in missing if '/' in word or not any(PACKAGE.rglob(word))}
    assert missing - set(FILES_OF_OTHERS) == set()


@pytest.mark.parametrize('name', ['ARCHITECTURE.md', 'CONTRIBUTING.md'])
def test_every_function_and_class_named_is_there(name):
    named = {path.rpartition('.')[2] for path in re.findall(r'`([A-Za-z_][\w.]*)\(\)`', DOCUMENTS[name])}
    named |= set(re.findall(r'`([A-Z][a-z]+[A-Z]\w*)`', DOCUMENTS[name]))
    source = ''.join(path.read_text(encoding='utf-8') for path in PACKAGE.rglob('*.py'))
    defined = set(re.findall(r'^ *(?:def|class) (\w+)', source, re.MULTILINE))
    assert named - defined - set(NAMES_OF_OTHERS) == set()


def test_the_documents_name_every_environment_variable_of_ours_and_no_other():
    source = ''.join(path.read_text(encoding='utf-8') for path in PACKAGE.rglob('*.py'))
    variables = set(re.findall(r"'(TIMM_[A-Z_]+)'", source))
    told = re.findall(r'^\| `(TIMM_[A-Z_]+)`', DOCUMENTS['docs/environment.md'], re.MULTILINE)
    assert sorted(told) == sorted(variables)
    assert set(re.findall(r'\bTIMM_[A-Z_]+', ''.join(DOCUMENTS.values()))) <= variables


def results(name: str) -> list[dict[str, str]]:
    """Rows of a benchmark's CSV file."""
    with (RESULTS / f'{name}.csv').open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def speed_lines() -> list[str]:
    """Rows of the README's table of whole networks."""
    over = {(row['network'], row['phase'], row['batch']): row['times_convnext'] for row in results('networks')}
    exported = {row['model']: float(row['median_ms']) for row in results('export') if row['form'] == 'ONNX'}
    dense = 'sw_tiny, dense'
    return [f'| {what} | {float(value):.2f} |' for what, value in (
        ('latency, batch 1', over[dense, 'latency', '1']),
        ('latency, batch 4', over[dense, 'latency', '4']),
        ('latency in ONNX Runtime, batch 1', exported['sw_tiny'] / exported['convnext_tiny']),
        ('training step, batch 4', over[dense, 'training step', '4']),
    )]


def target_lines() -> list[str]:
    """Rows of the benchmarks' table of ratios: all that have a bound, and those of maps that are channels last."""
    rows = [row for name in ('operator', 'networks', 'export') for row in results(f'{name}_targets')] + shift_targets()
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row['bound'] or 'channels last' in row['what']:
            groups.setdefault((row['what'], row['bound']), []).append(row)
    lines = []
    for (what, _), group in groups.items():
        if len(group) > 4:
            values = [float(row['value']) for row in group]
            lines.append(target_line(what, f'{len(group)} cases', f'{min(values):.2f} to {max(values):.2f}', group))
        elif all(re.fullmatch(r'stage \d', row['where']) for row in group):
            stages, values = ' / '.join(row['where'][-1] for row in group), [float(row['value']) for row in group]
            lines.append(target_line(what, f'stage {stages}', ' / '.join(f'{value:.2f}' for value in values), group))
        else:
            lines += [target_line(what, row['where'], f'{float(row["value"]):.2f}', [row]) for row in group]
    return lines


def target_line(what: str, where: str, measured: str, rows: list[dict[str, str]]) -> str:
    """A row of that table, with what is alike in its cases said once."""
    limits, verdicts = [f'{float(row["limit"] or 0):g}' for row in rows], [row['verdict'] for row in rows]
    limit, verdict = (' / '.join(words[:1] if len(set(words)) == 1 else words) for words in (limits, verdicts))
    if not rows[0]['bound']:
        return f'| {what} | {where} | {measured} | | |'
    return f'| {what} | {where} | {measured} | {rows[0]["bound"]} {limit} | {verdict} |'


def shift_targets() -> list[dict[str, str]]:
    """How many times as fast the Taichi shift-add is as the best of the ways in PyTorch, which is told to be 3."""
    best: dict[tuple[str, str], float] = {}
    for row in results('shift'):
        if row['way'] != 'Taichi':
            key = row['phase'], row['stage']
            best[key] = min(float(row['times_taichi']), best.get(key, float('inf')))
    return [
        dict(what=f'Taichi shift-add, {phase}, times faster than the best way in PyTorch', where=f'stage {stage}',
             value=str(value), bound='at least', limit='3', verdict='pass' if value >= 3 else 'short')
        for (phase, stage), value in best.items()]


def form_lines() -> list[str]:
    """Rows of the benchmarks' table of forms that a network is handed on in."""
    models = {}
    for row in results('export'):
        models.setdefault(row['model'], {})[row['form']] = row
    lines = []
    for model, forms in models.items():
        onnx, int8 = forms['ONNX'], forms['ONNX, int8']
        times = ' | '.join(
            f'{float(forms[form]["median_ms"]):.3g}'
            for form in ('eager', 'eager, merged', 'compiled, merged', 'ONNX', 'ONNX, int8'))
        sizes = f'{float(forms["eager, merged"]["file_mb"]):.1f} / {float(int8["file_mb"]):.1f}'
        errors = f'{float(onnx["difference"]):.1e} / {float(int8["difference"]):.2f}'
        lines.append(f'| `{model}` | {times} | {sizes} | {errors} of {float(onnx["largest_logit"]):.1f} |')
    return lines


def triton_lines() -> list[str]:
    """Rows of the benchmarks' table of registers that the Triton kernels take, on contiguous maps in bfloat16."""
    registers: dict[str, dict[str, list[str]]] = {}
    for row in results('triton'):
        if (row['dtype'], row['layout'], row['padding']) == ('bfloat16', 'contiguous', 'full'):
            registers.setdefault(row['map'], {}).setdefault(row['kernel'], []).append(row['registers'])
    return [f'| {name} | {" | ".join(map(" / ".join, kernels.values()))} |' for name, kernels in registers.items()]


@pytest.mark.parametrize(('name', 'lines'), [
    ('README.md', speed_lines), ('benchmarks/README.md', target_lines), ('benchmarks/README.md', form_lines),
    ('benchmarks/README.md', triton_lines)])
def test_the_numbers_told_are_those_of_the_results(name, lines):
    table = '\n'.join(lines())
    assert table in DOCUMENTS[name], f'{name} should have these rows:\n{table}'


def test_inception_next_is_as_much_faster_as_the_readme_says():
    times = {(row['network'], row['phase'], row['batch']): float(row['median_ms']) for row in results('networks')}

    def ratios(network: str) -> str:
        found = sorted({
            f'{time / times[("inception_next_tiny", *setting)]:.1f}' for (name, *setting), time in times.items()
            if name == network})
        return ' to '.join(dict.fromkeys((found[0], found[-1])))

    words = ' '.join(README.split())
    assert f'{ratios("sw_tiny, dense")} times as fast as `sw_tiny` and {ratios("convnext_tiny")} times as' in words
