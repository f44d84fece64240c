"""MME's reading of yes/no answers (arXiv:2306.13394), and the names of its subtasks."""

from typing import Literal

SUBTASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def read_yes_no(text: str) -> Literal["yes", "no", "other"]:
    """What an answer says: its first four characters hold "yes" or, failing that, "no", in any letter case.

    As MME's eval_tool: white space in front is not removed, and "None" or "Not sure" are "no". lmms-eval differs: it
    removes white space and full stops first, and takes "y" and "n".
    """
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
