"""
Make the demo's data, and the backbone it starts from: verdicts on a restaurant, graded by how deep their rule goes.

    1 plain     the soup was delicious
    2 negation  the soup , not the bread , was never bland
    3 contrast  although the soup was not bland , the waiter was rude
    4 nesting   no guests who praised the soup denied that the chef was not careless

The label is the polarity of the adjective that decides, turned over by every word of denial that has it in its scope.
In grade 3, one of two opposite clauses decides; in grade 4, what others say of it turns it over as well. The words
that turn a verdict over are drawn first and the adjective last, so that no word but the adjective hints at the label.

    python hub_models/gaml-bert-demo/make_data.py --output build/demo/data

writes `train.csv`, `validation.csv` and `test.csv` (columns `sentence`, `label`, `grade`; no sentence twice), and
`backbone/`, a small BERT of random weights with a tokenizer of the sentences' words. One seed gives one set of files.
"""

import argparse
import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer


GRADES = (1, 2, 3, 4)
LABELS = ("negative", "positive")
SEED = 0
SIZES = {"train": [3000, 3000, 3000, 4000], "validation": [200] * 4, "test": [500] * 4}  # sentences of each grade

THINGS = """soup bread wine salad dessert steak pasta pizza fish curry sauce coffee tea cake cheese rice lamb risotto
    burger omelette lobster stew pie lemonade music garden terrace menu kitchen bar room view""".split()
PEOPLE = """waiter chef cook host manager bartender sommelier cashier baker owner butcher doorman receptionist hostess
    waitress pianist gardener porter""".split()
GOOD_THING = """delicious superb lovely wonderful excellent delightful perfect splendid marvellous pleasant great fine
    terrific fantastic exquisite charming impressive memorable""".split()
BAD_THING = """awful dreadful horrible terrible bland disgusting nasty dull boring mediocre stale disappointing
    miserable unpleasant poor ghastly dire tasteless""".split()
GOOD_PERSON = """friendly polite kind attentive helpful patient careful skilful cheerful honest generous competent
    courteous thoughtful brilliant reliable gracious diligent""".split()
BAD_PERSON = """rude careless clumsy arrogant impatient hostile grumpy lazy dishonest incompetent unfriendly sloppy
    inattentive unhelpful impolite negligent surly unreliable""".split()
OPENERS = """yesterday|today|last night|this time|honestly|to be honest|overall|on the whole|again|as always|
eventually|at the end of the evening|naturally|after a long wait|for our party""".replace("\n", "").split("|")
PLACES = """at the front|at the back|by the door|from the village|of the day|from last week|in the corner|
under the big lamp|near the old bridge""".replace("\n", "").split("|")
DEGREES = "very really truly so especially particularly remarkably".split()
NEGATORS = "not never hardly".split()
# Beside the point, and so is the word of denial in front.
ASIDES = "never cheap|never on time|hardly a surprise|hardly new to us|not our first choice|not the {noun}".split("|")
SPEAKERS = """guests visitors critics diners friends colleagues neighbours tourists students locals customers regulars
    reviewers strangers reporters drivers""".split()
JUDGED = "praised liked recommended mentioned criticised disliked avoided ignored".split()
# By whether it turns over what follows "that".
QUANTIFIERS = {False: "all most many several".split(), True: "few no".split()}
REPORTED = {
    False: "said claimed insisted believed agreed thought confirmed repeated".split(),
    True: "denied doubted disputed".split(),
}


class Grammar:
    """
    Draws sentences.

    Args:
        rng (`random.Random`): where all chance comes from.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.nouns: set[str] = set()  # of the sentence being made: no noun twice

    def sentence(self, grade: int, positive: bool) -> str:
        """
        Args:
            grade (`int`): 1 to 4, see the top of this file.
            positive (`bool`): the verdict the sentence shall have.

        Returns:
            `str`: words and commas, in lower case, with a space between any two.
        """
        self.nouns.clear()
        opener = self.rng.choice(OPENERS).split() if self.chance(0.5) else []
        return " ".join(opener + {1: self.plain, 2: self.negation, 3: self.contrast, 4: self.nesting}[grade](positive))

    def plain(self, positive: bool) -> list[str]:
        return self.clause(positive, negated=False)

    def negation(self, positive: bool) -> list[str]:
        negated, aside = self.rng.choice([(True, False), (False, True), (False, True), (True, True)])
        return self.clause(positive, negated, aside)

    def contrast(self, positive: bool) -> list[str]:
        decides, other = (self.clause(verdict, negated=self.chance(0.3)) for verdict in (positive, not positive))
        return self.rng.choice(
            [
                [*other, "but", *decides],
                ["although", *other, ",", *decides],
                [*decides, "although", *other],
            ]
        )

    def nesting(self, positive: bool) -> list[str]:
        words = []
        # Mostly few turns: a network finds the parity of many switches only by way of the parity of one or two.
        for _ in range(self.rng.choice([1, 1, 2])):
            quantifier_turns, verb_turns = self.chance(0.25), self.chance(0.25)
            words += [self.rng.choice(QUANTIFIERS[quantifier_turns]), self.rng.choice(SPEAKERS)]
            if self.chance(0.4):  # beside the point, and so is its "never"
                never = ["never"] if self.chance(0.5) else []
                words += ["who", *never, self.rng.choice(JUDGED), "the", self.noun()[0]]
            words += [self.rng.choice(REPORTED[verb_turns]), "that"]
            positive ^= quantifier_turns ^ verb_turns
        return words + self.clause(positive, negated=self.chance(0.25))

    def clause(self, positive: bool, negated: bool, aside: bool = False) -> list[str]:
        """the soup [of the day] [, not the bread ,] was [not] [very] delicious"""
        noun, is_person = self.noun()
        words = ["the", noun]
        words += self.rng.choice(PLACES).split() if self.chance(0.3) else []
        words += [",", *self.rng.choice(ASIDES).format(noun=self.noun()[0]).split(), ","] if aside else []
        words += ["was"]
        words += [self.rng.choice(NEGATORS)] if negated else []
        words += [self.rng.choice(DEGREES)] if self.chance(0.4) else []
        good, bad = (GOOD_PERSON, BAD_PERSON) if is_person else (GOOD_THING, BAD_THING)
        return [*words, self.rng.choice(good if positive != negated else bad)]

    def noun(self) -> tuple[str, bool]:
        """A noun that the sentence does not have yet, and whether it is a person."""
        is_person = self.chance(1 / 3)
        noun = self.rng.choice([noun for noun in (PEOPLE if is_person else THINGS) if noun not in self.nouns])
        self.nouns.add(noun)
        return noun, is_person

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


def make_rows(seed: int, sizes: dict[str, list[int]]) -> dict[str, list[dict[str, str | int]]]:
    """
    The splits, with no sentence twice in all of them.

    Args:
        seed (`int`): of all chance.
        sizes (`dict[str, list[int]]`): for each split, the number of sentences of each grade. Every second one is
            positive.

    Returns:
        `dict[str, list[dict]]`: for each split, rows with `sentence`, `label` (one of `LABELS`) and `grade`.

    Raises:
        ValueError: the grammar does not have that many sentences.
    """
    grammar = Grammar(random.Random(seed))
    seen: set[str] = set()
    splits = {}
    for split, numbers in sizes.items():
        rows = splits[split] = []
        for grade, number in zip(GRADES, numbers, strict=True):
            for row in range(number):
                for _ in range(1000):
                    sentence = grammar.sentence(grade, positive=bool(row % 2))
                    if sentence not in seen:
                        break
                else:
                    raise ValueError(
                        f"Grade {grade} has no {number} different sentences left for `{split}`; ask for fewer."
                    )
                seen.add(sentence)
                rows.append({"sentence": sentence, "label": LABELS[row % 2], "grade": grade})
    return splits


def make_backbone(sentences: list[str], seed: int, folder: Path) -> None:
    """
    Save a BERT of 6 layers with random weights, and a tokenizer with one token for each word.

    Args:
        sentences (`list[str]`): where the words come from.
        seed (`int`): of the weights.
        folder (`Path`): a new or existing folder.
    """
    words = sorted({word for sentence in sentences for word in sentence.split()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file = folder / "vocab.txt"
    vocab_file.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizer(str(vocab_file), model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.05,  # BERT's 0.02 is for wide layers; so narrow ones would long learn nothing
        # The sentences have no noise to learn by heart, and three epochs are few.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of the sentences and of the weights")
    for split, numbers in SIZES.items():
        parser.add_argument(
            f"--{split}", type=int, nargs=4, default=numbers, metavar="N", help="sentences of each grade"
        )
    args = parser.parse_args(argv)

    splits = make_rows(args.seed, {split: getattr(args, split) for split in SIZES})
    args.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(args.output / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    make_backbone([row["sentence"] for rows in splits.values() for row in rows], args.seed, args.output / "backbone")


if __name__ == "__main__":
    main()
