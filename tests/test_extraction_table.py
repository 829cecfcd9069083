"""What counts as the answer of an output: a table written for the purpose, held to 100%.

On the same outputs the choice of parser alone moves a benchmark by more points than a method does,
so the rule is
pinned row by row: every form that the paper's prompts bring forth, and the ways in which published
parsers fail (guessing,
nearest option, first letter of the prose, article "A", pronoun "I", letters that the item does not
have, answers in the
thought, cut answers). "@" stands for a closed thought; expected None: no answer, never a guess.
"""

from __future__ import annotations

import pytest

from grading.extraction import extract_answer
from rewards import reward

SIGNS = ["fever", "cough", "headache", "rash"]
EARTH = ["Yes", "No"]
TEN = [
    "a ruptured esophagus",
    "aspirated pie",
    "pulmonary embolism",
    "acute pancreatitis",
    "food poisoning",
    "myocardial infarction",
    "SARS",
    "a ruptured aneurysm",
    "a stroke",
    "an allergic reaction",
]
VITAMINS = ["vitamin A", "vitamin B", "vitamin C", "vitamin D", "vitamin E"]
DRUGS = ["aspirin", "aspirin and heparin", "heparin", "heparin or warfarin"]
SUMS = ["10", "20", "30", "both A and B", "none of the above"]
NUMERALS = ["I and II", "II", "III only", "IV"]
SHUFFLED = ["D", "C", "B", "A"]
TWINS = ["x", "y", "x", "z"]
PICTURES = ["<image>", "<image>", "<image>"]
YES_NO = ["yes", "no"]
SENTENCES = [
    "A patient with DNA damage",
    "The patient has a stroke. I am sure",
    "Give vitamin A",
    "It is B. subtilis",
]


def think(text: str) -> str:
    return text.replace(
        "@", "<think>It could be A or C, or <answer>C</answer>, or \\boxed{C}.</think>\n"
    )


def tag(content: str) -> str:
    return f"@<answer>{content}</answer>"


# Every form of a right choice, for every letter: {L} the letter, {t} its text.
FORMS = [
    "{L}",
    "({L})",
    "{L}.",
    "{L})",
    "{L}: {t}",
    "{L}. {t}",
    "{L}) {t}",
    "({L}) {t}",
    "({L}): {t}",
    "({L}). {t}",
    "{L} : {t}",
    "{L}:{t}",
    " {L}: {t} ",
    "\n{L}\n",
    "\n{L}. {t}.\n",
    "{t}",
    "{t}.",
    "**{L}**",
    "**{L}: {t}**",
    "**{L}**: {t}",
    r"\boxed{{{L}}}",
    r"\boxed{{{L}: {t}}}",
    r"\text{{{L}}}",
    r"$\text{{({L})}}$",
    "`{L}`",
    '"{L}"',
    r"\({L}\)",
    r"\textbf{{{L}}}. {t}",
    "{L}. **{t}**",
]
RIGHT = [
    (tag(form.format(L=letter, t=text)), SIGNS, letter)
    for form in FORMS
    for letter, text in zip("ABCD", SIGNS)
]

CHOICE = [
    # the paper's own examples, word for word
    ("<think>...</think> <answer>B: No </answer>", EARTH, "B"),
    ("<think> your reasoning </think> <answer>B: No</answer>", EARTH, "B"),
    (
        "<think>x</think><answer>D. Herpes Simplex encephalitis</answer>",
        ["a", "b", "c", "Herpes simplex encephalitis"],
        "D",
    ),
    ("<think>x</think> <answer>A</answer>", EARTH, "A"),
    (tag("No"), EARTH, "B"),
    (tag("yes"), EARTH, "A"),
    (tag("NO."), EARTH, "B"),
    # ten options and the letters I and J; letters that an item does not have
    (tag("J"), TEN, "J"),
    (tag("I"), TEN, "I"),
    (tag("I: a stroke"), TEN, "I"),
    (tag("(J) an allergic reaction"), TEN, "J"),
    (tag("K"), TEN, None),
    (tag("I"), SIGNS, None),
    (tag("E"), SIGNS, None),
    (tag("E: fever"), SIGNS, None),
    (tag("C"), EARTH, None),
    (tag("(Z)"), TEN, None),
    (tag("D: rash"), SIGNS[:3], None),
    (tag("F. x"), VITAMINS, None),
    (tag("H: a ruptured aneurysm"), TEN, "H"),
    (tag("A stroke"), TEN, "I"),
    (tag("a stroke"), TEN, "I"),
    (tag("a ruptured esophagus"), TEN, "A"),
    (tag("A ruptured aneurysm"), TEN, "H"),
    (tag("a tumour"), TEN, None),
    # prose that begins with a capital letter is no letter
    (tag("A patient with fever"), SIGNS, None),
    (tag("I think it is cough"), TEN, None),
    (tag("A"), SENTENCES, "A"),
    (tag("A patient with DNA damage"), SENTENCES, "A"),
    (tag("Give vitamin A"), SENTENCES, "C"),
    (tag("It is B. subtilis"), SENTENCES, "D"),
    (tag("D: It is B. subtilis"), SENTENCES, "D"),
    (tag("The patient has a stroke. I am sure"), SENTENCES, "B"),
    (tag("DNA"), SENTENCES, None),
    (tag("vitamin A"), VITAMINS, "A"),
    (tag("Vitamin E."), VITAMINS, "E"),
    (tag("vitamin"), VITAMINS, None),
    (tag("C: vitamin C"), VITAMINS, "C"),
    (tag("A: vitamin B"), VITAMINS, None),
    (tag("vitamin K"), VITAMINS, None),
    # an option that is the beginning of another
    (tag("aspirin"), DRUGS, "A"),
    (tag("aspirin and heparin"), DRUGS, "B"),
    (tag("heparin"), DRUGS, "C"),
    (tag("heparin or warfarin"), DRUGS, "D"),
    (tag("warfarin"), DRUGS, None),
    (tag("aspirin or heparin"), DRUGS, None),
    (tag("A: aspirin and heparin"), DRUGS, None),
    (tag("B: aspirin and heparin"), DRUGS, "B"),
    (tag("aspir"), DRUGS, None),
    # options that speak of options
    (tag("both A and B"), SUMS, "D"),
    (tag("D: both A and B"), SUMS, "D"),
    (tag("D"), SUMS, "D"),
    (tag("A and B"), SUMS, None),
    (tag("none of the above"), SUMS, "E"),
    (tag("None of the above."), SUMS, "E"),
    (tag("E) none of the above"), SUMS, "E"),
    (tag("20"), SUMS, "B"),
    (tag("20."), SUMS, "B"),
    (tag("B: 20"), SUMS, "B"),
    (tag("$20$"), SUMS, "B"),
    (tag("25"), SUMS, None),
    (tag("B: 30"), SUMS, None),
    (tag("20 mg"), SUMS, None),
    (tag("2"), SUMS, None),
    (tag("II"), NUMERALS, "B"),
    (tag("IV"), NUMERALS, "D"),
    (tag("III only"), NUMERALS, "C"),
    (tag("III"), NUMERALS, None),
    (tag("I and II"), NUMERALS, "A"),
    (tag("B: II"), NUMERALS, "B"),
    (tag("C: II"), NUMERALS, None),
    # options whose texts are letters: the letter goes first; texts that two options share name
    # neither
    (tag("A"), SHUFFLED, "A"),
    (tag("A: D"), SHUFFLED, "A"),
    (tag("D"), SHUFFLED, "D"),
    (tag("A: B"), SHUFFLED, None),
    (tag("x"), TWINS, None),
    (tag("A: x"), TWINS, "A"),
    (tag("C: x"), TWINS, "C"),
    (tag("B: x"), TWINS, None),
    (tag("z"), TWINS, "D"),
    (tag("B"), PICTURES, "B"),
    (tag("C: <image>"), PICTURES, "C"),
    (tag("<image>"), PICTURES, None),
    (tag("D"), PICTURES, None),
    # yes and no as words, never as parts of words
    (tag("yes"), YES_NO, "A"),
    (tag("No"), YES_NO, "B"),
    (tag("A: yes"), YES_NO, "A"),
    (tag("normal"), YES_NO, None),
    (tag("unknown"), YES_NO, None),
    (tag("nodule"), YES_NO, None),
    (tag("no, it is normal"), YES_NO, None),
    (tag("not yes"), YES_NO, None),
    (tag("yes and no"), YES_NO, None),
    (tag("A: no"), YES_NO, None),
    # two answers are none
    (tag("A or B"), SIGNS, None),
    (tag("A and B"), SIGNS, None),
    (tag("A, B"), SIGNS, None),
    (tag("A/B"), SIGNS, None),
    (tag("AB"), SIGNS, None),
    (tag("A B"), SIGNS, None),
    (tag("(A)(B)"), SIGNS, None),
    (tag("(A) (B)"), SIGNS, None),
    (tag("A. or B."), SIGNS, None),
    (tag("A: fever B: cough"), SIGNS, None),
    (tag("A: fever, B: cough"), SIGNS, None),
    (tag("B. C."), SIGNS, None),
    (tag("B: cough or C: headache"), SIGNS, None),
    (tag("fever, cough"), SIGNS, None),
    (tag("A: fever\nB: cough\nC: headache\nD: rash"), SIGNS, None),
    (tag("ABCD"), SIGNS, None),
    (tag("A-D"), SIGNS, None),
    (tag("B: cough (or C)"), SIGNS, None),
    (tag("B) cough, not (C)"), SIGNS, None),
    (tag("{A, B}"), SIGNS, None),
    (tag(r"\boxed{\text{Answer: } B}"), SIGNS, "B"),
    (tag("option (J)"), TEN, "J"),
    # neither negations nor lower case before a text nor other marks
    (tag("not B"), SIGNS, None),
    (tag("the answer is B"), SIGNS, "B"),
    (tag("Answer: B"), SIGNS, "B"),
    (tag("b"), SIGNS, "B"),
    (tag("Option B"), SIGNS, "B"),
    (tag("b: cough"), SIGNS, None),
    (tag("(b)"), SIGNS, "B"),
    (tag("B cough"), SIGNS, None),
    (tag("B because of the cough"), SIGNS, None),
    (tag("2"), SIGNS, None),
    (tag("?"), SIGNS, None),
    (tag("B?"), SIGNS, None),
    (tag("I don't know"), TEN, None),
    (tag("none"), SIGNS, None),
    (tag("cogh"), SIGNS, None),
    (tag("coughing"), SIGNS, None),
    (tag("a cough"), SIGNS, None),
    (tag("B: rash"), SIGNS, None),
    (tag("A. headache"), SIGNS, None),
    (tag("(C) cough"), SIGNS, None),
    (tag("B: a dry cough"), SIGNS, "B"),
    (tag("B. cough, since it is dry"), SIGNS, "B"),
    # other scripts' punctuation
    (tag("（B）"), SIGNS, "B"),
    (tag("B：cough"), SIGNS, "B"),
    (tag("Ｂ"), SIGNS, "B"),
    (tag("B。"), SIGNS, "B"),
    (tag("“B”"), SIGNS, "B"),
    (tag("В"), SIGNS, None),  # the last is Cyrillic
    # nothing in the tag
    ("@<answer></answer>", SIGNS, None),
    ("@<answer> \n </answer>", SIGNS, None),
    ("@<answer>.</answer>", SIGNS, None),
    (r"@<answer>\boxed{}</answer>", SIGNS, None),
    ("@<answer></answer> B", SIGNS, None),
    (tag("..."), SIGNS, None),
    # where the answer stands
    ("<answer>B</answer>", SIGNS, "B"),
    ("B", SIGNS, None),
    ("@B", SIGNS, None),
    ("", SIGNS, None),
    ("@", SIGNS, None),
    ("@Answer: B", SIGNS, None),
    ("@The answer is (B).", SIGNS, None),
    ("@So the correct option is **B: cough**.", SIGNS, None),
    ("@<answer>A</answer> Wait. <answer>B</answer>", SIGNS, "B"),
    ("@<answer>B</answer> Hope this helps!", SIGNS, "B"),
    ("@<answer>A</answer><answer></answer>", SIGNS, None),
    ("@<answer>A <answer>B</answer>", SIGNS, "B"),
    ("@<answer>B</answer> <answer>A", SIGNS, "B"),
    ("@B</answer>", SIGNS, None),
    ("@</answer>B<answer>", SIGNS, None),
    ("@<Answer>B</Answer>", SIGNS, None),
    ("@< answer >B</ answer >", SIGNS, None),
    ("@<answer>B</answr>", SIGNS, None),
    ("@<answer>B", SIGNS, None),
    ("@<answer>B: cou", SIGNS, None),
    ("@<answer>", SIGNS, None),
    ("@<ans", SIGNS, None),
    ("<think>so <answer>B</answer></think>", SIGNS, None),
    ("<think>so <answer>B</answer>", SIGNS, None),
    ("<think>B is it", SIGNS, None),
    ("<think>\\boxed{B}", SIGNS, None),
    ("so B</think><answer>C</answer>", SIGNS, "C"),
    ("<think>a<think>b</think><answer>B</answer>", SIGNS, "B"),
    ("<think>a</think></think><answer>B</answer>", SIGNS, "B"),
    ("<think>a</think><answer>A</answer><think>b</think><answer>B</answer>", SIGNS, "B"),
    ("<think>a</think><answer>A</answer><think>again <answer>B</answer>", SIGNS, None),
    ("<think>a</think><answer>A</answer></think>no answer after this", SIGNS, None),
    ("@I looked at <answer> tags. <answer>B</answer>", SIGNS, "B"),
    ("<think></think><answer>B</answer>", SIGNS, "B"),
    ("</think>\n<answer>B</answer>", SIGNS, "B"),
    ("<think>endless\nendless\n</think>\n<answer>B: cough</answer>", SIGNS, "B"),  # a forced exit
    # a box stands in for the tag, and only where there is no tag
    (r"@\boxed{B}", SIGNS, "B"),
    (r"@\boxed{\text{B}}", SIGNS, "B"),
    (r"@\boxed{(B)}", SIGNS, "B"),
    (r"@\boxed{B: cough}", SIGNS, "B"),
    (r"@$\boxed{\textbf{(B) cough}}$", SIGNS, "B"),
    (r"@\fbox{B}", SIGNS, "B"),
    (r"@\boxed{cough}", SIGNS, "B"),
    (r"@\boxed{A} no: \boxed{B}", SIGNS, "B"),
    (r"@\boxed{A, B}", SIGNS, None),
    (r"@\boxed{A} or \boxed{B}", SIGNS, None),
    (r"@\boxed{A}, \boxed{B}", SIGNS, None),
    (r"@\boxed{B", SIGNS, None),
    (r"@\boxed{A} then \boxed{B", SIGNS, None),
    (r"@\boxed{A} <answer>B</answer>", SIGNS, "B"),
    (r"@<answer>B</answer> \boxed{A}", SIGNS, "B"),
    (r"@boxed{B}", SIGNS, None),
    (r"@<answer>so \boxed{B}</answer>", SIGNS, "B"),
    (r"@\boxed{2}", SIGNS, None),
    (r"@\boxed{E}", SIGNS, None),
]

# Unambiguous, and refused today: an option's whole text that is a letter beyond the item's own, a
# colon with nothing.
# an option that is a capital beyond the item's letters, and a letter with its colon alone
CHOICE += [
    (tag("I"), ["I", "II", "III", "IV"], "A"),
    (tag("K"), ["Na", "K", "Cl", "Mg"], "B"),
    (tag("X"), ["W", "X", "Y", "Z"], "B"),
    (tag("B:"), SIGNS, "B"),
    (tag("B :"), SIGNS, "B"),
]

# (output, gold, is it right?), for kind math: extraction and equality together
MATH = [
    (tag("2 "), "2", True),
    (tag("42"), "42", True),
    (tag("42."), "42", True),
    (tag("42.0"), "42", True),
    (tag("41"), "42", False),
    (tag("1,000"), "1000", True),
    (tag("1000"), "1,000", True),
    (tag("−5"), "-5", True),
    (tag("-5"), "5", False),
    (tag("$42$"), "42", True),
    (tag(r"\(42\)"), "42", True),
    (tag(r"\[42\]"), "42", True),
    (tag(r"\frac{1}{2}"), "0.5", True),
    (tag("1/2"), "0.5", True),
    (tag("½"), "0.5", True),
    (tag(".5"), "0.5", True),
    (tag(r"\frac12"), "1/2", True),
    (tag("2/4"), "1/2", True),
    (tag(r"\boxed{42}"), "42", True),
    (tag(r"It is \boxed{42}."), "42", True),
    (tag("x = 42"), "42", True),
    (tag(r"2\sqrt{3}"), r"\sqrt{12}", True),
    (tag(r"\text{42}"), "42", True),
    (tag("**42**"), "42", True),
    (tag("42 or 43"), "42", False),
    (tag("42, 43"), "42", False),
    (tag("about 42"), "42", False),
    (tag("not 42"), "42", False),
    (tag(""), "42", False),
    (tag("forty-two"), "42", False),
    (tag("4.2e1"), "42", True),
    (tag("0.333"), r"\frac{1}{3}", False),
    (tag("(1, 2)"), "(1,2)", True),
    (tag("(2, 1)"), "(1,2)", False),
    (tag("{1, 2}"), r"\{2, 1\}", True),
    (tag("x+1"), "1+x", True),
    (tag("10^3"), "1000", True),
    (tag("1e3"), "1000", True),
    ("@42", "42", False),
    ("@The answer is 42", "42", False),
    ("@#### 42", "42", False),
    (r"@\boxed{42}", "42", True),
    (r"@So $\boxed{42}$.", "42", True),
    (r"@\boxed{\boxed{42}}", "42", True),
    (r"@\boxed{42", "42", False),
    (r"@\boxed{41} \boxed{42", "42", False),
    (r"@\boxed{41}. Rather \boxed{42}", "42", True),
    (r"@\boxed{42} and \boxed{43}", "42", False),
    (r"@\boxed{\frac{1}{2}}", "0.5", True),
    ("<think>\\boxed{42}</think>", "42", False),
    ("<think>42 <answer>42</answer>", "42", False),
    ("<answer>42</answer>", "42", True),
    ("@<answer>41</answer> <answer>42</answer>", "42", True),
    ("@<answer>42</answer> <answer>41</answer>", "42", False),
    (r"@<answer>41</answer> \boxed{42}", "42", False),
    ("@<answer>4", "42", False),
    ("@<answer>42", "42", False),
    (r"@\boxed{}", "42", False),
]

# (output, kind, options, lenient answer): what the lenient score, shown beside the strict one,
# takes
LENIENT = [
    ("@Answer: B", "choice", SIGNS, "B"),
    ("@The answer is (B).", "choice", SIGNS, "B"),
    ("@I choose B", "choice", SIGNS, "B"),
    ("@**Answer: B. cough**", "choice", SIGNS, "B"),
    ("<think>B is it", "choice", SIGNS, "B"),
    ("@<answer>B", "choice", SIGNS, "B"),
    ("@<answer>it could be B</answer>", "choice", SIGNS, "B"),
    ("@no idea", "choice", SIGNS, None),
    ("@E", "choice", SIGNS, None),
    ("@The answer is 42", "math", None, "42"),
    ("@#### 42", "math", None, "42"),
    ("@it is 1,000", "math", None, "1,000"),
    ("@42 of them", "math", None, "42"),
    ("@many", "math", None, None),
    ("<think>3 and 4", "math", None, "4"),
    ("@Answer: 42", "math", None, "42"),
]


@pytest.mark.parametrize("output, options, letter", RIGHT + CHOICE)
def test_choice(output, options, letter):
    """Prevents a parser that guesses, that takes the first letter that it meets, or that misses a
    form which was asked
    for: each of these moves a benchmark by points."""
    found = extract_answer(think(output), "choice", options)
    assert (found.text if found else None) == letter


@pytest.mark.parametrize("output, gold, right", MATH)
def test_math(output, gold, right):
    """Prevents the last number of cut or hedging prose from counting, and equal numbers in other
    dress from failing."""
    problem = {"id": "m", "task": "t", "kind": "math", "question": "?", "answer": gold}
    assert reward(problem, think(output)).score == right


@pytest.mark.parametrize("output, kind, options, answer", LENIENT)
def test_lenient(output, kind, options, answer):
    """Prevents a lenient score that is blind to what a strict one refuses for its form alone, or
    that finds an answer
    where there is none; and strict scores that let these through."""
    found = extract_answer(think(output), kind, options, lenient=True)
    assert (found.text if found else None) == answer
    assert extract_answer(think(output), kind, options) is None


@pytest.mark.parametrize("kind, gold", [("choice", "B"), ("math", "42")])
def test_cut_text_is_never_an_answer(kind, gold):
    """Prevents a completion that was cut at its limit from scoring, whatever it said before."""
    options = SIGNS if kind == "choice" else None
    problem = {
        "id": "m",
        "task": "t",
        "kind": kind,
        "question": "?",
        "answer": gold,
        "options": options,
    }
    for reason, score in (("stop", 1), ("forced+stop", 1), ("length", 0), ("forced+length", 0)):
        assert reward(problem, think(tag(gold)), reason).score == score


def test_the_table_is_as_large_as_it_says():
    """Prevents rows lost in an edit."""
    rows = [(o, str(k)) for o, k, _ in RIGHT + CHOICE + MATH]
    assert len(set(rows)) == len(rows) and len(rows) + len(LENIENT) >= 300
