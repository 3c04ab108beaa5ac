"""Run the quick tests with the lowest versions that setup.cfg allows.

    python ci/lowest.py [options of pytest]

Makes an environment of its own in a temporary folder, of the Python that runs this script, and pins every requirement
of the package to its lower bound. The requirements of the tests alone are left free.
"""
import configparser
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


def main(arguments: list[str]) -> int:
    """Make the environment, run the tests, and return pytest's exit status."""
    pins = lowest_versions()
    print('\n'.join(pins), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = folder / 'bin' / 'python'
        (folder / 'pins.txt').write_text('\n'.join(pins))
        venv.create(folder, with_pip=True)
        subprocess.run(
            [python, '-m', 'pip', 'install', '--quiet', '--constraint', folder / 'pins.txt', '--editable', '.[test]'],
            cwd=ROOT, check=True)
        return subprocess.run([python, '-m', 'pytest', '-m', 'not slow', *arguments], cwd=ROOT).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
