"""What the `sdlora` command can do, a file a noun: each declares its arguments in `add`, and turns what comes back into text."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
OPTION_HELP = "Any option follows as --section.key VALUE, or --key VALUE where the key is unique: see `sdlora options`."
