"""What each mechanism does to the demo's concept and to what the base model knew, at equal steps and by the oracle.

    python tests/studies/ablation.py            # trains what is missing, two runs at a time; kill it and start it again at will
    python tests/studies/ablation.py --table    # only prints the table of tests/studies/ablation.jsonl, and draws ablation.png

Rows were chosen, and configs/mini.toml tuned, on other prompts and seeds than those measured here.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from study import CONFIG, Figures, Study, export_of, intruders, judged

OFF = {"loss.prior": "0", "loss.embedding_norm": "0"}
HIGH = {"optimizer.text_encoder_rate": "1.4e-3", **OFF}
# Row -> options beside the preset's. Order of importance: a study that is cut short has the first rows with all seeds.
ROWS: dict[str, dict[str, str]] = {
    "no regulariser": OFF,
    "preset: norm 0.1, prior 1": {},
    "text encoder at 10x its rate": HIGH,
    "10x, embedding norm 1": HIGH | {"loss.embedding_norm": "1"},
    "10x, pinned embeddings 1": HIGH | {"loss.pinned_embedding": "1"},
    "10x, prior 1": HIGH | {"loss.prior": "1"},
    "norm 0.1 alone": OFF | {"loss.embedding_norm": "0.1"},
    "pinned embeddings 1 alone": OFF | {"loss.pinned_embedding": "1"},
    "prior 1 alone": OFF | {"loss.prior": "1"},
    "alpha not learned": OFF | {"lora.learned_alpha": "false"},
    "init orthonormal (down frozen)": OFF | {"lora.init": "orthonormal"},
    "init contrast (down frozen)": OFF | {"lora.init": "contrast"},
    "init PiSSA": OFF | {"lora.init": "pissa"},
    "init LoRA-GA": OFF | {"lora.init": "gradient"},
    "DoRA": OFF | {"lora.kind": "dora"},
    "MoRA": OFF | {"lora.kind": "mora"},
    "matched rate": OFF | {"optimizer.matched": "true"},
    "full fine-tuning": OFF | {"lora.kind": "full"},
    "ReLoRA, 4 rounds": OFF | {"lora.merge_every": "150"},
}


def figures(folder: Path) -> Figures:
    from sdlora import config, events
    from sdlora.mini.measure import Options, measure

    pinned = config.load([CONFIG]).loss.pinned_prompts
    found = measure(Options(lora=export_of(folder), pinned=pinned))
    told = events.read(folder / "events.jsonl")
    drifts = [e.embedding_norm_drift for e in told if isinstance(e, events.Stepped)]
    turned = [e.pinned_drift for e in told if isinstance(e, events.Measured)]
    return {
        **judged(found),
        "not pinned": found["not pinned"]["kind"],
        "drift": mean(drifts[-50:]),
        "turned": turned[-1],
        "intruders": intruders(export_of(folder)),
    }


# Column -> key of a figure, what it is multiplied by, digits
COLUMNS: dict[str, tuple[str, float, int]] = {
    "concept right": ("concept", 100, 0),
    "known things kept": ("kept", 100, 0),
    "kinds no pinned prompt names": ("not pinned", 100, 0),
    "fish unasked": ("unasked", 100, 0),
    "norm drift": ("drift", 100, 1),
    "pinned prompts turned": ("turned", 100, 1),
    "intruders a layer": ("intruders", 1, 2),
}


def plot(path: Path) -> None:
    """A dot for each run: the concept against what was kept; a row's dots have one colour and its name beside their middle."""
    from matplotlib.figure import Figure

    by_row = {row: [(100 * of["concept"], 100 * of["kept"]) for of in found] for row, found in STUDY.by_row().items()}
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in ROWS if row in by_row]
    for number, row in enumerate(rows):
        xs, ys = zip(*by_row[row], strict=True)
        marker = "osD^vP*X"[number // 10]
        axes.scatter(xs, ys, s=42, alpha=0.8, color=f"C{number % 10}", marker=marker, linewidths=0, label=f"{number + 1} {row}")
        axes.annotate(str(number + 1), (mean(xs), mean(ys)), xytext=(5, 4), textcoords="offset points", fontsize=9, color=f"C{number % 10}")
    axes.set_xlabel("concept right, % of 50 pictures on backgrounds that no training picture shows")
    axes.set_ylabel("known things kept, % of 200 pictures")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


STUDY = Study(Path(__file__), ROWS, COLUMNS)

if __name__ == "__main__":
    if STUDY.main(__doc__, figures, at_once=2):
        plot(STUDY.results.with_suffix(".png"))
