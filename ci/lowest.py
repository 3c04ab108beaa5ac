"""Run the quick tests with the lowest versions that setup.cfg allows.

    python ci/lowest.py [options of pytest]

Copies the clone, as git sees it, to a temporary folder and makes an environment there, of the Python that runs this
script, in which every requirement of the package is pinned to its lower bound. The requirements of the tests alone are
left free.
"""
import configparser
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest_versions() -> list[str]:
    """Requirements of the package, pinned to their lower bounds."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    requirements = parser['options']['install_requires'].strip().splitlines()
    return [requirement.replace(' >= ', '==') for requirement in requirements]


def copy_clone(target: Path) -> None:
    """Copy what git tracks or would track."""
    names = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split('\0')):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def main(arguments: list[str]) -> int:
    """Make the environment, run the tests, and return pytest's exit status."""
    pins = lowest_versions()
    print('\n'.join(pins), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone, environment = folder / 'clone', folder / 'environment'
        python = environment / 'bin' / 'python'
        copy_clone(clone)
        (folder / 'pins.txt').write_text('\n'.join(pins))
        venv.create(environment, with_pip=True)
        subprocess.run(
            [python, '-m', 'pip', 'install', '--quiet', '--constraint', folder / 'pins.txt', '--editable', '.[test]'],
            cwd=clone, check=True)
        return subprocess.run([python, '-m', 'pytest', '-m', 'not slow', *arguments], cwd=clone).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
