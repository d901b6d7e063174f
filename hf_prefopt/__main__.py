"""Run the command line with `python -m hf_prefopt COMMAND …`."""

import sys

from hf_prefopt.commands import main

if __name__ == "__main__":
    sys.exit(main())
