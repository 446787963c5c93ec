"""Options of every kind of adapter and every optimizer, for tests of what must hold for all of them."""

from typing import Any

EVERY_KIND: dict[str, dict[str, Any]] = {
    "lora": {"lora.unet": '["everything"]'},
    "lora gradient": {"init": "gradient", "calibration_batches": 2},
    "lora activation": {"init": "activation", "calibration_batches": 2},
    "lora contrast": {"init": "contrast", "calibration_batches": 2},
    "dora": {"lora.kind": "dora", "lora.unet": '["all-linear+conv"]'},
    "dora pissa": {"lora.kind": "dora", "init": "pissa"},
    "mora": {"lora.kind": "mora", "lora.unet": '["attention+ff", "resnet"]'},
    "full": {"lora.kind": "full", "lora.unet": '["attention+ff", "resnet"]', "rate": 1e-3},
    "relora": {"merge_every": 2},
    "dropouts": {"dropout": 0.2, "rank_dropout": 0.3, "module_dropout": 0.1, "max_norm": 0.5},
}
EVERY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "prodigy": {"algorithm": "prodigy", "rate": 1, "text_encoder_rate": 1},
    "came": {"algorithm": "came"},
    "adafactor": {"algorithm": "adafactor"},
    "lion": {"algorithm": "lion", "rate": 1e-3},
    "schedule_free": {"algorithm": "schedule_free", "schedule": "constant"},
    "adamw": {"algorithm": "adamw", "arguments": "{ amsgrad = true }"},
    "matched": {"matched": "true", "rate": 1e-4},
}
