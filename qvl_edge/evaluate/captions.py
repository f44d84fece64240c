"""Captions: nocaps and Flickr30k, scored by CIDEr-D over the words of a Penn Treebank tokenizer (docs/quality.md).

The files are in COCO's format. The official nocaps_val_4500_captions.json names an image `file_name` and gives its
`domain`, which is averaged separately; those averages keep the word frequencies of the whole file, where nocaps' server
takes those of the domain.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvl_edge.evaluate.records import ids_of, read_json, records_of
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task, by_item

PROMPT = "Describe the image in English:"
MAX_NGRAM = 4
SIGMA = 6.0  # of CIDEr-D's penalty on a difference in length
Gram = tuple[str, ...]


def read(file: Path, images: Path | None) -> list[Item]:
    """An item for each image; its reference is the list of its captions."""
    value = read_json(file)
    rows = records_of(file, value, "images")
    captions: dict[str, list[str]] = {}
    for row in records_of(file, value, "annotations"):
        captions.setdefault(str(row.get("image_id")), []).append(row.text("caption"))
    items = []
    for row, identity in zip(rows, ids_of(rows, "id"), strict=True):
        path = row.image(row.text("image", "file_name"), images or file.parent)
        if identity not in captions:
            raise QualityDataError(f"{row.where}: no entry of 'annotations' has image_id {identity}")
        items.append(Item(identity, (path, PROMPT), captions[identity], group=str(row.get("domain", default=""))))
    return items


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """CIDEr times 100. It depends on all captions of the file: part of a file is not comparable with the whole."""
    values = cider([predictions[item.id].text for item in items], [item.reference for item in items])
    return [by_item("CIDEr", items, values)]


def _task(name: str, title: str) -> Task:
    return Task(
        name,
        title,
        read,
        score,
        source="Qwen-VL eval_mm/evaluate_caption.py",
        generation={"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 30},
    )


CAPTIONS = (_task("nocaps", "nocaps (val)"), _task("flickr30k", "Flickr30k (Karpathy test)"))


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D (arXiv:1411.5726) of every candidate, 0 to 10, against its one or more references.

    As pycocoevalcap 1.2 computes it: the mean is what COCOEvalCap prints as "CIDEr"; papers report 100 times that. The
    references of the whole corpus determine how rare an n-gram is, so one item alone scores 0.
    """
    for index, given in enumerate(references):
        if not given:
            raise QualityDataError(f"item {index} of {len(references)} has no reference; CIDEr needs one or more")
    wanted = [[tokenize(one) for one in some] for some in references]
    items_with = Counter(gram for some in wanted for gram in set().union(*map(_grams, some)))
    unseen = math.log(max(1, len(wanted)))
    rarity = {gram: unseen - math.log(count) for gram, count in items_with.items()}

    def weigh(words: Sequence[str]) -> dict[Gram, float]:
        return {gram: count * rarity.get(gram, unseen) for gram, count in _grams(words).items()}

    scores = []
    for words, some in zip(map(tokenize, candidates), wanted, strict=True):
        weights = weigh(words)
        total = sum(
            _cosines(weights, weigh(reference)) * math.exp(-((len(words) - len(reference)) ** 2) / (2 * SIGMA**2))
            for reference in some
        )
        scores.append(10.0 * total / MAX_NGRAM / len(some))
    return scores


def _cosines(ours: dict[Gram, float], theirs: dict[Gram, float]) -> float:
    """The sum of the cosines for each n-gram length; repeats in a candidate count only as often as in the reference."""
    shared, ours_squared, theirs_squared = [0.0] * MAX_NGRAM, [0.0] * MAX_NGRAM, [0.0] * MAX_NGRAM
    for gram, weight in ours.items():
        ours_squared[len(gram) - 1] += weight * weight
        shared[len(gram) - 1] += min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0)
    for gram, weight in theirs.items():
        theirs_squared[len(gram) - 1] += weight * weight
    norms = [math.sqrt(one * other) for one, other in zip(ours_squared, theirs_squared, strict=True)]
    return sum(dot / norm for dot, norm in zip(shared, norms, strict=True) if norm)


def _grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(words) - n + 1))


# Words, as COCO's caption evaluation splits them: Penn Treebank tokens in lower case, without punctuation. CIDEr is
# defined on the output of pycocoevalcap's Java tokenizer; this one was written from the description of Penn Treebank
# tokenization and from that tool's output on captions, and needs no Java. "can't" and "dog's" are two words each,
# "mid-air", "and/or", "10:30" and "U.S." one; brackets stay, as -lrb- and so on; £ becomes #, and € becomes $.
#
# Out of scope, and sometimes split differently: web and mail addresses, HTML tags and entities, smileys, phone numbers,
# Unicode beyond letters and common symbols. The Java tool reads all captions as one text, in which "row b." keeps its
# period or not depending on the first word of the next caption; here the end of a caption ends a sentence, so it goes.

_LETTERS = (  # of a character class: blocks of scripts, less what is punctuation or a symbol in them
    "A-Za-zªµºÀ-ÖØ-öø-\u02af\u02bb-\u02c1\u0300-\u0374\u0376-\u037d\u0386\u0388-\u03f5\u03f7-\u0559\u0561-\u0587"
    "\u0591-\u05bd\u05d0-\u05f2\u0610-\u061a\u0620-\u065f\u066e-\u06d3\u06d5-\u0963\u0970-\u0e3e\u0e40-\u0e4e"
    "\u0e50-\u1fbc々〆〱-〵ぁ-\u309aゝ-ゟァ-ヺー-\ud7ff\uf900-\ufb06０-９Ａ-Ｚａ-ｚｦ-ￜ"
)
_SYMBOLS = "¡¥-©¬®-´¶-¹¿×÷฿‚„-‣‰-‸※⁄⁰-₎℀-\u2bff、。〒・！-／：-＠［-｀｛-･￠￡￥"
_QUOTES = {"‘": "`", "’": "'", "“": "``", "”": "''"}  # where two meet, upstream leaves a word such as ```
_REWRITES = (
    {one + other: _QUOTES[one] + _QUOTES[other] for one in _QUOTES for other in _QUOTES}
    | {"‘‘": "", "’’": "", "n’t": "n't"}
    | {f"’{end}": f"'{end}" for end in "s m d re ve ll".split()}
    | dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
    | dict(zip("£€¤¢½¼¾⅓⅔", "# $ $ cents 1/2 1/4 3/4 1/3 2/3".split(), strict=True))
)
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co "
    "col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov "
    "hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon "
    "mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph ph.d plc pres prof pte pty pvt rd rep reps rev "
    "rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed "
    "wis wisc wm wyo"
)
_STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # abbreviations only if spelled so or in capitals
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"  # abbreviations only there
_STARTERS = (  # of a sentence; a letter and a period before one of them are a word and the sentence's end
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. "
    "Now Once One Other Our Since So Some Such That The Their Then There These They This We What When While Yet You"
)


def _any(words: str) -> str:
    return f"(?:{'|'.join(map(re.escape, sorted(words.split(), key=len, reverse=True)))})"


A, L = f"[{_LETTERS}]", f"[0-9{_LETTERS}]"  # a letter; a letter or a digit
WORD = f"{L}+(?:_{L}+)*"
ENDING = "(?i:s|m|d|re|ve|ll)"  # of a contraction, after the apostrophe
CLIPPED = r"(?i:em|til|cause|\d0s)"  # words that begin with an apostrophe
INNER = f"['’](?!{ENDING}(?!{L}))"  # an apostrophe inside a word, not that of a contraction or a genitive
END = f"(?![-/.!?'’]?{L})"  # no word continues here
ACRONYM = rf"[A-Za-z](?:\.[A-Za-z])+(?!\.?{A})\.?"
ABBREVIATION = rf"(?:(?i:{_any(_ABBREVIATIONS)})|{_any(_STATES + ' ' + _STATES.upper())})\."
BEFORE_NUMBER = rf"(?i:{_any(_BEFORE_NUMBERS)})\.(?=\s?\d)"
SENTENCE = rf"\s*$|\s+{_any(_STARTERS + ' ' + _STARTERS.upper())}(?:\s|$)"
HYPHENED = rf"(?:[-‐‑](?:{ACRONYM}(?!-)|[dloDLO]['’]{A}{{2,}}|{WORD}))"  # one part after the first
SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of a slash

# The first alternative that matches wins, so their order counts.
TOKEN = re.compile(
    rf"""-{{2,}} | \.{{3,}} | ''                                      # no words, so not captured
    | ( \d{{1,4}}[ -]\d{{1,4}}/\d{{1,4}} | \d\d?/\d\d?-\d{{2,4}} | \d+⁄\d+  # 3 1/2
    | {L}+?(?=[nN]['’`][tT]) | [nN]['’`][tT](?!{A})                   # do n't
    | (?i: can(?=not{END}) | (?:gon|wan)(?=na{END}) | got(?=ta{END}) | (?:gim|lem)(?=me{END}) | 't(?=is\b|was) )
    | [‘’“”]{{2}} | ['’][nN]['’] | '[nN](?=\s|$) | ['’]\d\d(?=\s|$)   # rock 'n' roll, fish 'n chips, '69
    | '(?:{ENDING}(?!{A})|{CLIPPED}) | ’(?:{ENDING}|{CLIPPED}|[nN])   # 's, 'em
    | (?i: c'mon | c['’]est | cap['’]n | nat'l | e'er | s'mores | li'l )(?!{L})
    | (?i: ol | dunkin | somethin | [dl] )['’](?!{A}{A}) | [yYj]{INNER}(?={A}) | [jJ]['’](?!{A})  # y' all
    | (?:[dlnoA-XZ]{INNER}{A}{{2,}}|o['’]o){HYPHENED}*                # d'état, o'clock, O'Neil
    | {A}+[aeiouyAEIOUY]{INNER}[aeiouA-Z]{A}*                         # ma'am, Hawai'i, Da'Quan
    | (?i:c\+\+|[cf]\#) | [A-Z]+(?:&[A-Z]+)+ | [A-Z]+\$               # C++, R&B, US$
    | {SIDE}(?:/{SIDE}){{1,2}}                                        # and/or
    | [A-Za-z0-9][A-Za-z0-9.,]*{HYPHENED}+(?:\.(?=[,;:]))?            # U.S.-made, 3,000-foot
    | {WORD}\.(?=[,;:]) | (?i:ph\.d\.) | {ACRONYM}                    # any word keeps its period before a comma
    | {A}{L}*(?:[.!?]{A}{L}*)+(?:\.(?=[,;:]))?                        # a missing space: here.The
    | {ABBREVIATION} | {BEFORE_NUMBER} | [A-Za-z]\.(?!{SENTENCE})
    | [+-]?\d*(?:[.:,]\d+)+ | {WORD}{HYPHENED}* | [+-]\d+ | \#{A}+ | @[A-Za-z](?:{WORD})?
    | [!?]{{2,}} | \*+ | _+ | << | >> | \#\# | [][(){{}}#$%&+/<=>@\\^|~£€¤¢½¼¾⅓⅔{_SYMBOLS}] )""",
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """The words of one caption, line breaks being spaces in it."""
    found = (token.lower() for token in TOKEN.findall(text))
    return [word for token in found for word in _REWRITES.get(token, token).split()]
