"""Every error that is the user's to mend: one sentence, with the way out.

SdloraError
+-- ConfigError     an option: unknown, out of bounds, contradictory
+-- DataError       the pictures or captions
+-- WeightsError    a model or LoRA file: missing, wrong kind, damaged
+-- TrainingError   the run itself: in use, no space, loss not finite, nothing to resume
"""


class SdloraError(Exception):
    """The command line shows its message alone and exits with code 2."""


class ConfigError(SdloraError):
    pass


class DataError(SdloraError):
    pass


class WeightsError(SdloraError):
    pass


class TrainingError(SdloraError):
    pass


def first_line(error: BaseException) -> str:
    """Of what a library says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
