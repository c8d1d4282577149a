"""python -m onnxpress: the command line."""

import sys

from onnxpress.cli import main

if __name__ == "__main__":
    sys.exit(main())
