"""Scaling of losses for fp16, whose smallest number is 6e-8: most gradients of activations lie below it (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

START, RISES_AFTER = 2.0**16, 1000  # as in the paper's section 3.2: high, halved where it overflows, doubled after so many steps without


class LossScale:
    """A power of two, so that what is scaled up and down again is the same to the bit; 1 and no more where it is not `used`."""

    def __init__(self, used: bool):
        self.used = used
        self.value = START if used else 1.0
        self.steps = 0  # since it last changed

    def up(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.used else loss

    def down(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their gradients."""
        if self.used:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.value)

    def lowered(self, finite: bool) -> bool:
        """Look at what came of a step. Whether the scale was lowered, and the step may so have failed by its scale alone."""
        if not self.used or (not finite and self.value == 1):
            return False
        self.steps += 1
        if not finite:
            self.value, self.steps = self.value / 2, 0
        elif self.steps == RISES_AFTER:
            self.value, self.steps = self.value * 2, 0
        return not finite

    def state(self) -> list[float]:
        return [self.value, self.steps]

    def load_state(self, state: Sequence[float]) -> None:
        self.value, self.steps = float(state[0]), int(state[1])
