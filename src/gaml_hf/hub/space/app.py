"""
Watch early exiting: a text goes through a GAML-BERT, and each layer's exit shows what it would answer.

As a Space it shows the model that `model.json` names. Anywhere else, without a network: `python app.py CHECKPOINT`.
"""

import html
import json
import math
import os
import sys
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by the import

import gradio as gr
import torch
from transformers import pipeline


STRATEGIES = {
    "entropy": "Entropy: leave once doubt is low enough",
    "max_prob": "Max prob: leave once one class is likely enough",
    "patience": "Patience: leave once the answer stays the same",
    "budgeted": "Budgeted: every text leaves at one layer",
    "none": "None: run all layers",
}
PARAMETERS = {
    "budgeted": "budgeted_exit",
    "patience": "patience",
    "entropy": "exit_threshold",
    "max_prob": "exit_threshold",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers
CSS = """
.gaml { font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.gaml .answer { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1.2rem; margin-bottom: .4rem; }
.gaml .answer b { font-size: 1.7rem; line-height: 1.2; }
.gaml .why { margin: 0 0 1rem; font-size: 1.02rem; opacity: .8; }
.gaml .row {
  display: grid; grid-template-columns: 4.6rem 1fr 11rem 6rem; align-items: center; gap: .8rem;
  padding: .22rem .5rem; border-radius: .4rem; border: 1.5px solid transparent;
}
.gaml .row.left { border-color: currentColor; font-weight: 600; }
.gaml .row.idle { opacity: .38; }
.gaml .track { height: 1.15rem; background: var(--border-color-primary); border-radius: .25rem; overflow: hidden; }
.gaml .bar { height: 100%; border-radius: .25rem; }
.gaml .row.idle .bar { background-image: repeating-linear-gradient(45deg, #fff8 0 4px, transparent 4px 8px); }
.gaml .note { text-align: right; white-space: nowrap; }
.gaml .says { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.gaml .legend { margin-top: .6rem; font-size: .85rem; opacity: .7; }
.gaml h3 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; font-weight: 600; }
.gaml table { width: 100%; border-collapse: collapse; }
.gaml table, .gaml table tr { border: none !important; }
.gaml table :is(th, td) {
  text-align: left; padding: .38rem .6rem; border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important;
}
.gaml table :is(th, td):first-child { padding-left: 0; }
.gaml code { font-size: .85em; padding: 0; background: none; border: none; }
.gaml tr.chosen td { font-weight: 600; }
.gaml table .number { text-align: right !important; }
@media (max-width: 640px) {
  .gaml .row { grid-template-columns: 3.8rem 1fr 7.5rem; }
  .gaml .note { display: none; }
}
"""


def call_arguments(strategy: str, speed: float, config) -> dict:
    """
    What the pipeline is called with for a place of the slider.

    Args:
        strategy (`str`): an `exit_strategy`.
        speed (`float`): from 0, the surest, to 1, the fastest.
        config ([`GamlBertConfig`]): of the model.
    """
    exits = config.exit_layers
    slow = 1 - speed
    value = {
        "budgeted": exits[round(slow * (len(exits) - 1))],
        "patience": max(1, round(1 + slow * (len(exits) - 2))),
        "entropy": round(speed, 3),
        "max_prob": round(1 - speed * (1 - 1 / config.num_labels), 3),
    }
    return {"exit_strategy": strategy} | ({PARAMETERS[strategy]: value[strategy]} if strategy in PARAMETERS else {})


def reason(arguments: dict, exit_layer: int, probabilities: list[list[float]], config) -> str:
    """Why a text left where it did, in a sentence. `probabilities` are those of every exit, shallowest first."""
    strategy, exits = arguments["exit_strategy"], config.exit_layers
    position = exits.index(exit_layer)
    p = probabilities[position]
    if strategy == "none":
        return f"All {config.num_hidden_layers} layers ran, as asked."
    if strategy == "budgeted":
        return f"Every text leaves after layer {exit_layer}, as asked."
    unsure = -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))
    answers = [max(range(len(row)), key=row.__getitem__) for row in probabilities]
    threshold, patience = arguments.get("exit_threshold"), arguments.get("patience")
    reached, told = {
        "patience": (
            position >= (patience or 0) and len(set(answers[position - (patience or 0) : position + 1])) == 1,
            f"the last {(patience or 0) + 1} exits agree",
        ),
        "entropy": (unsure < (threshold or 0), f"its entropy, {unsure:.3f}, is below {threshold}"),
        "max_prob": (max(p) > (threshold or 0), f"its best class has {max(p):.3f}, above {threshold}"),
    }[strategy]
    if reached:
        return f"It left after layer {exit_layer} because there {told}."
    return f"No exit was sure enough, so the last one, after layer {exit_layer}, answered."


class Viewer:
    """
    What the page shows, as HTML, for one model.

    Args:
        source (`str`): a checkpoint folder, or a repository's name.
        revision (`str`, *optional*): its commit.
    """

    def __init__(self, source: str, revision: str | None = None):
        self.classifier = pipeline("text-classification", model=source, revision=revision, trust_remote_code=True)
        self.config = self.classifier.model.config

    def exit_probabilities(self, row: dict[str, str]) -> list[list[float]]:
        """What every exit says, shallowest first: `num_exits` lists of `num_labels` numbers."""
        model = self.classifier.model
        inputs = self.classifier.preprocess(row)  # the same tokens as for an answer
        batch = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        with torch.inference_mode():
            return model(**batch, output_exit_logits=True).exit_logits[0].float().softmax(dim=-1).tolist()

    def show(self, text: str, text_pair: str, strategy: str, speed: float) -> tuple[str, str]:
        """
        Returns:
            `tuple[str, str]`: the answer with a bar for each exit, and the table of all strategies.

        Raises:
            gradio.Error: the text is blank, or anything else that the pipeline refuses.
        """
        row = {"text": text or ""} | ({"text_pair": text_pair} if (text_pair or "").strip() else {})
        try:
            calls = {name: call_arguments(name, speed, self.config) for name in STRATEGIES}
            answers = {name: self.classifier(row, **arguments) for name, arguments in calls.items()}
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        probabilities = self.exit_probabilities(row)
        bars = self._bars(calls[strategy], answers[strategy], probabilities)
        return bars, self._table(calls, answers, strategy)

    def _bars(self, arguments: dict, answer: dict, probabilities: list[list[float]]) -> str:
        layers, left = self.config.num_hidden_layers, answer["exit_layer"]
        lines = [
            '<div class="gaml"><div class="answer">'
            f'<b style="color:{self._color(answer["label"])}">{html.escape(answer["label"])}</b>'
            f"<span>{answer['score']:.1%} sure</span><span>{left} of {layers} layers run</span>"
            f"<span>{layers / left:.2f}x speed-up in layers</span></div>"
            f'<p class="why">{html.escape(reason(arguments, left, probabilities, self.config))}'
            + (" The text was cut to the longest input." if answer["truncated"] else "")
            + "</p>"
        ]
        for m, p in zip(self.config.exit_layers, probabilities, strict=True):
            best = max(range(len(p)), key=p.__getitem__)
            label = self.config.id2label[best]
            state = "left" if m == left else "idle" if m > left else ""
            note = {"left": "left here", "idle": "not run", "": "went on"}[state]
            lines.append(
                f'<div class="row {state}" data-layer="{m}"><span>Layer {m}</span><div class="track">'
                f'<div class="bar" style="width:{p[best]:.1%};background-color:{self._color(label)}"></div></div>'
                f'<span class="says">{html.escape(label)} {p[best]:.1%}</span><span class="note">{note}</span></div>'
            )
        lines.append(
            '<div class="legend">A bar is the probability of the class that the exit would answer. Pale rows were not '
            "run; they show what the deeper exits would have said.</div></div>"
        )
        return "".join(lines)

    def _table(self, calls: dict[str, dict], answers: dict[str, dict], chosen: str) -> str:
        lines = [
            '<div class="gaml"><h3>All strategies, at this speed</h3><table><tr><th>Strategy</th><th>Setting</th>'
            '<th>Answer</th><th class="number">Sure</th><th class="number">Left after</th>'
            '<th class="number">Speed-up</th></tr>'
        ]
        for name, answer in answers.items():
            setting = ", ".join(f"{key}={value}" for key, value in calls[name].items() if key != "exit_strategy")
            lines.append(
                f'<tr class="{"chosen" if name == chosen else ""}"><td>{name}</td>'
                f"<td><code>{setting or 'all layers'}</code></td>"
                f'<td style="color:{self._color(answer["label"])}">{html.escape(answer["label"])}</td>'
                f'<td class="number">{answer["score"]:.1%}</td><td class="number">layer {answer["exit_layer"]}</td>'
                f'<td class="number">{self.config.num_hidden_layers / answer["exit_layer"]:.2f}x</td></tr>'
            )
        return "".join([*lines, "</table></div>"])

    def _color(self, label: str) -> str:
        return COLORS[self.config.label2id[label] % len(COLORS)]


def build(viewer: Viewer, name: str, examples: list[str]) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="GAML-BERT: where does a text leave?", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Where does a text leave?\n`{name}` is an encoder with exits (GAML-BERT). An easy text leaves "
            "early, a hard one runs on."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(examples[0] if examples else "", label="Text", lines=3, elem_id="text")
                pair = gr.Textbox(label="Second text", info="For a model of pairs alone", lines=1, elem_id="pair")
                strategy = gr.Radio(
                    [(title, key) for key, title in STRATEGIES.items()],
                    value=viewer.config.exit_strategy,
                    label="When to leave",
                    elem_id="strategy",
                )
                speed = gr.Slider(0, 1, 0.5, step=0.01, label="Speed", info="0: surest, 1: fastest", elem_id="speed")
                button = gr.Button("Classify", variant="primary", elem_id="go")
                if examples:
                    gr.Examples(examples, text)
            with gr.Column(scale=3, min_width=380):
                bars = gr.HTML(elem_id="bars", label="Exits")
                table = gr.HTML(elem_id="table", label="Strategies")
        inputs, outputs = [text, pair, strategy, speed], [bars, table]
        gr.on([button.click, text.submit, pair.submit], viewer.show, inputs, outputs, api_name="show")
        gr.on([strategy.input, speed.release], viewer.show, inputs, outputs, api_visibility="private")
        if examples:
            page.load(viewer.show, inputs, outputs, api_visibility="private")
    return page


def launch(source: str, revision: str | None = None, examples: list[str] | None = None, **kwargs):
    """Load the model and serve the page; `kwargs` are those of `gradio.Blocks.launch`."""
    font = ["system-ui", "sans-serif"]  # no font is fetched
    theme = gr.themes.Soft(primary_hue="blue", font=font, font_mono=["ui-monospace", "monospace"])
    page = build(Viewer(source, revision), Path(source).name if Path(source).is_dir() else source, examples or [])
    return page.launch(theme=theme, css=CSS, **kwargs)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        launch(sys.argv[1], examples=sys.argv[2:])
    else:
        chosen = json.loads(Path(__file__).with_name("model.json").read_text(encoding="utf-8"))
        launch(chosen["model"], chosen["revision"], chosen["examples"])
