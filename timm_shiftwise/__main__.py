"""`python -m timm_shiftwise` is the command `timm-shiftwise`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
