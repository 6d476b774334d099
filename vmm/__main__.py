"""`python -m vmm`."""

import sys

try:
    from vmm.cli.main import main

    code = main()
except KeyboardInterrupt:  # before there is anything that could say more
    code = 130
sys.exit(code)
