"""Model families: each a record of functions, so that the loop knows none of them by name."""
