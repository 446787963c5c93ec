"""Model families: each a record of functions, so that the loop knows none of them by name."""

import os

# On Linux, tensors of 2 MiB and more lie in pages of 2 MiB: a step that makes them anew takes its memory from the system 500 times less
# often. PyTorch reads this once, for its first tensor, which importing diffusers makes; a user's own value counts.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
