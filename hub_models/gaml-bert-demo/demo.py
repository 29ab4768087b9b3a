"""
The demonstration, `make demo`: make the data, train a GAML-BERT on it from scratch, and look at where sentences leave.

Some two minutes on two cores, without a network. Everything goes to `build/demo/`: `data/`, and `model/`, a complete
checkpoint folder with its scores (`run.json`) and pictures.

Exits with an error unless the last exit is right for 90% of the test sentences and the mean exit layer rises with the
grade.
"""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # recipe.json names its files from here
FOLDER = Path("build/demo")

GRADES = {1: "plain", 2: "negation", 3: "contrast", 4: "nesting"}
SENTENCES = [
    "this time the soup was truly delicious",
    "the waiter was very rude",
    "the soup was not delicious",
    "the wine , not the bread , was never bland",
    "the soup was delicious but the waiter was careless",
    "the soup was delicious although the waiter was not polite",
    "no guests denied that the chef was friendly",
    "few critics who praised the soup denied that the waiter was not careless",
]
WANTED_ACCURACY = 0.9


def main() -> None:
    started = time.time()
    os.chdir(ROOT)
    # Before anything imports the Hub: no network, and no trace outside the folder.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str((FOLDER / "cache").resolve())}
    # The tensors are tiny: threads that wait for each other would cost more than they do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    subprocess.run([sys.executable, HERE / "make_data.py", "--output", FOLDER / "data"], check=True)
    subprocess.run([sys.executable, "run_glue_gaml.py", HERE / "recipe.json"], check=True)

    from transformers import pipeline

    # As anyone would who has the folder alone: its own code, and the exit policy its config names.
    classify = pipeline("text-classification", model=str(FOLDER / "model"), trust_remote_code=True, batch_size=100)
    with open(FOLDER / "data" / "test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    problems = show_grades(classify, rows)

    print(f"\n{'layer':>5}  {'label':<8}  score  sentence")
    for sentence, answer in zip(SENTENCES, classify(SENTENCES), strict=True):
        print(f"{answer['exit_layer']:>5}  {answer['label']:<8}  {answer['score']:.3f}  {sentence}")
    pictures = ", ".join(sorted(path.name for path in (FOLDER / "model").glob("*.png")))
    print(f"\n{FOLDER / 'model'} holds the checkpoint and {pictures}. All of this took {time.time() - started:.0f} s.")
    if problems:
        sys.exit("\n".join(problems))


def show_grades(classify, rows: list[dict[str, str]]) -> list[str]:
    """Print how each grade does; return what is not as it should be."""
    sentences = [row["sentence"] for row in rows]
    early = classify(sentences)
    first = classify(sentences, budgeted_exit=1)
    last = classify(sentences, exit_strategy="none")

    def accuracy(answers, chosen: list[int]) -> float:
        return sum(answers[i]["label"] == rows[i]["label"] for i in chosen) / len(chosen)

    print("\nTest sentences: accuracy with early exits, and that of the first and of the last exit alone")
    print(f"{'grade':<12}{'sentences':>10}{'accuracy':>10}{'exit 1':>10}{'exit 6':>10}{'mean exit layer':>18}")
    mean_layers = []
    for grade, name in GRADES.items():
        chosen = [i for i, row in enumerate(rows) if row["grade"] == str(grade)]
        mean_layers.append(sum(early[i]["exit_layer"] for i in chosen) / len(chosen))
        scores = "".join(f"{accuracy(answers, chosen):>10.3f}" for answers in (early, first, last))
        print(f"{f'{grade} {name}':<12}{len(chosen):>10}{scores}{mean_layers[-1]:>18.2f}")

    problems = []
    if (reached := accuracy(last, list(range(len(rows))))) < WANTED_ACCURACY:
        problems.append(f"The last exit must be right for {WANTED_ACCURACY:.0%} of the sentences. Got {reached:.1%}.")
    if any(deeper <= shallower for shallower, deeper in zip(mean_layers[:-1], mean_layers[1:], strict=True)):
        problems.append(
            f"The mean exit layer must rise with the grade. Got {', '.join(f'{layer:.2f}' for layer in mean_layers)}."
        )
    return problems


if __name__ == "__main__":
    main()
