"""The page as a whole: its head, its tabs, its looks."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from . import dataset, generate, loras, runs, sweeps, train
from .paths import Places

STYLE = Path(__file__).parent / "style.css"
# The system's own fonts: Gradio's default theme would ask Google for some.
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
HEAD = '<header class="sd-head"><h1>sdlora</h1><p>Train a LoRA that does not break its model.</p></header>'


def build(places: Places) -> gr.Blocks:
    with gr.Blocks(title="sdlora", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEAD, apply_default_css=False)
        current = gr.Textbox(visible="hidden", elem_id="current")  # name of the run that is shown
        swept = gr.Textbox(visible="hidden", elem_id="swept")  # of the sweep that was begun last
        wishes = gr.BrowserState({}, storage_key="sdlora-generate", secret="sdlora")  # in a tab it would come later than the page
        with gr.Tabs(selected="train") as tabs:
            with gr.Tab("Train", id="train"):
                screen = train.build(places, current, swept)
            with gr.Tab("Runs", id="runs") as runs_tab:
                timer = runs.build(places, current, tabs, runs_tab, screen)
                sweeps.build(places, swept, tabs, runs_tab, timer)
            with gr.Tab("Generate", id="generate"):
                generate.build(places, wishes)
            with gr.Tab("Dataset", id="dataset"):
                dataset.build(places, screen)
            with gr.Tab("Inspect", id="inspect"):
                loras.build(places)
    return page


def theme() -> gr.Theme:
    sizes = {"spacing_size": "sm", "radius_size": "md", "text_size": "md"}
    base = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO, **sizes)
    # White on a teal that is dark enough to read it on.
    fills = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    return base.set(**fills, **{f"{name}_dark": fill for name, fill in fills.items()})
