"""Build what a package index takes, check it, and use the wheel in a fresh environment.

    pip install -e '.[dev]'
    python ci/package.py [FOLDER]

FOLDER, `dist` by default, gets the source distribution, the wheel that is built from it, and README.html, the page as
an index shows it. The environment is of the Python that runs this script; what is tried there runs in an empty folder,
with the clone out of sight.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from lowest import copy_clone
from readme_renderer.markdown import render

CI = Path(__file__).parent
ROOT = CI.parent

MODELS = '''
import timm, torch, timm_shiftwise
model = timm.create_model('test_sw.digits', pretrained=True).eval()
x = torch.randn(2, *model.pretrained_cfg['input_size'])
with torch.inference_mode():
    merged = timm.utils.reparameterize_model(model)
    assert torch.allclose(merged(x), model(x), rtol=1e-4, atol=1e-4)
model.train()(x).sum().backward()
assert timm.create_model('sw_tiny', num_classes=10).num_classes == 10
'''
WITHOUT_IMPORT = "import timm; timm.create_model('test_sw.digits', pretrained=True)"


def build(output: Path) -> Path:
    """Build both distributions of the files that git has, the wheel from the source distribution, check and keep them.

    Returns:
        The wheel.
    """
    with tempfile.TemporaryDirectory() as name:
        clone, built = Path(name) / 'clone', Path(name) / 'built'
        copy_clone(clone)
        subprocess.run([sys.executable, '-m', 'build', '--outdir', built, clone], check=True)
        files = sorted(built.iterdir())
        subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *files], check=True)
        output.mkdir(parents=True, exist_ok=True)
        kept = [Path(shutil.copy2(file, output)) for file in files]
    wheel, = [file for file in kept if file.suffix == '.whl']
    return wheel


def write_page(output: Path) -> None:
    """The README as an index renders it."""
    page = render((ROOT / 'README.md').read_text())
    if page is None:
        raise SystemExit('README.md cannot be rendered.')
    (output / 'README.html').write_text(f'<!DOCTYPE html><meta charset="utf-8"><title>README</title>{page}')


class Environment:
    """A fresh environment, and an empty folder in which its programs run."""

    def __init__(self, folder: Path) -> None:
        self._bin, self._home = folder / 'environment' / 'bin', folder / 'home'
        self._home.mkdir()
        venv.create(self._bin.parent, with_pip=True)

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run one of its programs, show what it prints, and return that.

        Raises:
            SystemExit: If it ends with another status.
        """
        print('$', *command, flush=True)
        # neither the clone nor what the caller has enabled or set up
        clean = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'TIMM_SHIFTWISE'))}
        run = subprocess.run(
            [self._bin / command[0], *command[1:]], cwd=self._home, env=clean, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        print(run.stdout, flush=True)
        if run.returncode != status:
            raise SystemExit(f'{" ".join(map(str, command))} ended with {run.returncode}, not {status}.')
        return run.stdout

    def files(self) -> set[Path]:
        """What lies in it, but for what Python compiles."""
        return {path for path in self._bin.parent.rglob('*') if '__pycache__' not in path.parts}


def try_out(wheel: Path, environment: Environment) -> None:
    """Install the wheel alone and use it, then with the extra of the quickstart, then see it go."""
    python, command = 'python', 'timm-shiftwise'
    environment.run('pip', 'install', '--quiet', wheel)
    environment.run('pip', 'check')
    environment.run(python, '-c', MODELS)
    environment.run(python, '-c', WITHOUT_IMPORT, status=1)
    environment.run(command, 'enable')
    environment.run(python, '-c', WITHOUT_IMPORT)
    environment.run(command, 'doctor')
    environment.run(command, 'profile', 'sw_tiny')
    environment.run(command, 'recipe', 'sw_tiny')
    refused = environment.run(command, 'quickstart', status=2)  # the extra is not there yet, and it says so
    if 'quickstart]' not in refused:
        raise SystemExit('The quickstart does not name the extra that it lacks.')
    environment.run('pip', 'install', '--quiet', f'{wheel}[quickstart]', 'mypy')
    environment.run(command, 'quickstart')
    environment.run(python, '-m', 'mypy', '--strict', '--allow-untyped-calls', CI / 'typed_use.py')
    environment.run('pip', 'uninstall', '--yes', '--quiet', 'timm-shiftwise')
    left = sorted(path for path in environment.files() if 'shiftwise' in path.name)
    if left:
        raise SystemExit(f'Uninstalling leaves {", ".join(map(str, left))}.')
    environment.run(python, '-c', 'import timm')


def main() -> None:
    """Build, check, and try."""
    parser = argparse.ArgumentParser(description='Build the distributions and use the wheel in a fresh environment.')
    parser.add_argument('folder', type=Path, nargs='?', default=ROOT / 'dist', help='where they go (default: dist)')
    output = parser.parse_args().folder.resolve()
    wheel = build(output)
    write_page(output)
    with tempfile.TemporaryDirectory() as name:
        try_out(wheel, Environment(Path(name)))
    print(f'{wheel.name} and its source distribution lie in {output}.')


if __name__ == '__main__':
    main()
