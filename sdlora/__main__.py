"""`python -m sdlora` is the `sdlora` command."""

import sys

from sdlora.cli import main

sys.exit(main())
