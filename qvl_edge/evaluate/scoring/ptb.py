"""Splits captions into words as COCO's caption evaluation does: Penn Treebank words, lower case, no punctuation.

CIDEr is defined on the words of pycocoevalcap's Java tokenizer. This one was written from the description of Penn
Treebank tokenization and from that tool's answers to captions; it needs no Java. "can't" and "dog's" are two words
each, "mid-air", "and/or", "10:30" and "U.S." one; brackets stay, as -lrb- and so on; £ becomes #, and € becomes $.

Out of scope, and at times split in another way: addresses of web and mail, tags and entities of HTML, smileys, phone
numbers, Unicode beyond letters and common symbols. The Java tool reads all captions as one text, in which "row b." has
its period or not by the first word of the next caption; here a caption's end is a sentence's end, so it has none.
"""

import re

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
END = f"(?![-/.!?'’]?{L})"  # nothing goes on here
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
    | {A}{L}*(?:[.!?]{A}{L}*)+(?:\.(?=[,;:]))?                        # a space left out: here.The
    | {ABBREVIATION} | {BEFORE_NUMBER} | [A-Za-z]\.(?!{SENTENCE})
    | [+-]?\d*(?:[.:,]\d+)+ | {WORD}{HYPHENED}* | [+-]\d+ | \#{A}+ | @[A-Za-z](?:{WORD})?
    | [!?]{{2,}} | \*+ | _+ | << | >> | \#\# | [][(){{}}#$%&+/<=>@\\^|~£€¤¢½¼¾⅓⅔{_SYMBOLS}] )""",
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """The words of one caption, line breaks being spaces in it."""
    found = (token.lower() for token in TOKEN.findall(text))
    return [word for token in found for word in _REWRITES.get(token, token).split()]
