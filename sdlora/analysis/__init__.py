"""What an adapter did to the model it was trained on.

What stands here needs no torch, so that a command can tell of it at once.
"""

TOP = 10  # of an adapted weight's left singular vectors are looked at, as in the figures of arXiv 2410.21228
THRESHOLD = 0.5  # an intruder's |cosine| with every left singular vector of the base lies below this
