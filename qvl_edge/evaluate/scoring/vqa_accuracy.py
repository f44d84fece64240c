"""VQA accuracy: how many of ten people gave this answer, three being enough.

As the official vqaEval.py has it (GT-Vision-Lab/VQA, of which Qwen-VL's eval_mm/vqa_eval.py is a copy), oddities too:
the text is brought to one form by rules, the people's answers by fewer of them than the model's. lmms-eval treats both
alike, so its figures lie a little higher where people wrote articles or numbers in words.
"""

import re
from collections.abc import Sequence

from qvl_edge.evaluate.task import QualityDataError

NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Forms that get back the one apostrophe that was left out.
_WHOLE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
CONTRACTIONS = {
    whole[:place] + whole[place + 1 :]: whole for whole in _WHOLE for place, letter in enumerate(whole) if letter == "'"
} | {"somebody'd": "somebodyd"}  # so in the official table


def without_punctuation(text: str) -> str:
    """Marks become spaces, or nothing where one stands beside a space or a comma between digits; full stops go."""
    joined = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official call passes re.UNICODE, which is 32, as the count


def normalize(text: str) -> str:
    """A model's answer in the form it is compared in: no marks, lower case, numbers to ten in digits, no articles."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1. Each person is left out once, min(1, agreeing others / 3) is taken, and the mean over the people given.

    answers: people's answers, ten in VQAv2, OK-VQA, TextVQA and VizWiz. They lose their punctuation unless all ten are
    the same, and nothing else is done to them.
    """
    if not answers:
        raise QualityDataError(
            "an item has no answers of people; VQA accuracy needs one or more, and the data sets have ten"
        )
    given = [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
    agreeing = given.count(normalize(prediction))
    others = len(given) - agreeing
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(given)
