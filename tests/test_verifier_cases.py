r"""Answers that verifiers are known to misjudge, with the verdict that a person gives and the reason.

Many are from what users of math-verify and of training libraries on top of it reported; the others try to be called
right without being so, or to keep a verifier busy. `correct` on a wrong answer trains on it, so that is the error that
must not happen; `unverifiable` is what an honest verifier says where the reference and the answer alone do not tell.
"""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from distill.records import Message, Outcome, Prompt, Teacher, Trace
from distill.verifiers import math, number
from distill.verifiers.latex import LONGEST_EXPRESSION, canonical, unreadable
from distill.verifiers.pool import VerifierPool

C, W, U = "correct", "wrong", "unverifiable"


def prompt(gold: str, verifier: str = "math", question: str = "?") -> Prompt:
    return Prompt.of([Message(role="user", content=question)], gold=gold, verifier=verifier)


def trace(answer: str) -> Trace:
    return Trace(trace_id="t", prompt_id="p", cfg="c", sample=0, teacher=Teacher(engine="test"), answer=answer)


def boxed(content: str) -> Trace:
    return trace(f"Thus \\(\\boxed{{{content}}}\\).")


# reference, content of the box, verdict of `math`, why
MATH_CASES: list[tuple[str, str, Outcome, str]] = [
    # --- numbers in other writing
    ("0.5", r"\frac12", C, "digits without braces"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}", C, "display fraction"),
    (r"\frac{1}{2}", r"\tfrac12", C, "small fraction"),
    (r"\frac{1}{2}", r"\frac1{2}", C, "one brace"),
    (r"\frac{1}{25}", r"\frac125", U, "LaTeX sets a half and a five, the writer may have meant 1/25"),
    (r"\sqrt{2}", r"\sqrt2", C, "root without braces"),
    (r"\sqrt{12}", r"\sqrt12", U, "LaTeX sets the root over the 1 only"),
    (r"2\sqrt{3}", r"\sqrt{12}", C, "equal roots"),
    (r"\frac{\sqrt{3}}{3}", "sqrt(3)/3", C, "plain words of mathematics"),
    (r"e^{16}-1", "-1 + exp(16)", C, "plain words of mathematics"),
    (r"\frac{\pi}{2}", "pi/2", C, "plain words of mathematics"),
    (r"-2\pi", "-2*pi", C, "plain words of mathematics"),
    ("18π", r"18\pi", C, "Unicode"),
    (r"\frac{3\sqrt{3}}{\pi}", "(3√3)/π", C, "Unicode root"),
    ("2.5", r"2\frac{1}{2}", C, "mixed number"),
    ("5/4", "1 1/4", C, "plain mixed number"),
    ("2", "2 2/3", W, "the whole part of a mixed number is not the number"),
    ("10", "4 10/3", W, "no reading of an improper mixed number gives its numerator"),
    ("7/2", "3½", C, "Unicode mixed number"),
    (r"\frac{5}{2}\pi", r"2\frac{1}{2}\pi", C, "mixed number in a product"),
    ("5", "2(3)", W, "the parser adds numbers side by side as if they were mixed"),
    ("6", "2(3)", C, "a product"),
    ("6", "(2)(3)", C, "a product"),
    ("6", r"\frac{4}{2}(3)", C, "a product"),
    ("5", "2 3", U, "numbers side by side"),
    ("5", r"2\cdot 3", W, "a product"),
    ("1000", "1 000", C, "thousands by spaces: the parser multiplies by 0"),
    ("0", "1 000", W, "... and calls it zero"),
    ("1000", r"1\,000", C, "thousands by thin spaces"),
    ("1000", "1{,}000", C, "thousands in braces"),
    ("1234567", "1,234,567", C, "thousands"),
    ("29322216", r"29,\!322,\!216", C, "thousands as MATH writes them"),
    ("16", "016", C, "leading zero"),
    ("3.14", "3,14", U, "decimal comma, or two numbers"),
    ("314", "3,14", W, "no reading gives 314"),
    (r"\frac{1}{3}", r"0.\overline{3}", C, "repeating decimal"),
    ("0", r"0.\overline{3}", W, "... which is not 0"),
    (r"\frac{1}{6}", r"0.1\overline{6}", C, "repeating decimal after a digit"),
    ("1500", "1.5e3", C, "scientific notation: the parser multiplies by Euler's number"),
    ("0.0015", r"1.5 \times 10^{-3}", C, "scientific notation"),
    ("3.5e5", r"3.5\cdot10^5", C, "scientific notation on both sides"),
    ("0.0000001", "0.0000002", W, "rounding to six decimals"),
    (r"10^{-20}\pi", r"10^{-21}\pi", W, "tiny differences are differences"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", W, "tiny differences are differences"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", W, "tiny differences are differences"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{6}", W, "tiny differences are differences"),
    (r"e^{-300}", r"e^{-301}", W, "tiny differences are differences"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}", W, "upright e: the parser fails and finds the 1"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 - e^{-1}", C, "upright e"),
    ("4", r"4\sqrt(2)", W, "a root in parentheses: the parser fails and finds the 4"),
    (r"4\sqrt{2}", r"4\sqrt(2)", C, "a root in parentheses"),
    (r"\sqrt{2}", "1.414214", C, "six digits of what has no end"),
    (r"\sqrt{2}", "1.41", W, "three digits are not asked for by an exact reference"),
    ("9.42", r"3\pi", U, "a rounded reference"),
    ("9.42", r"4\pi", W, "rounded from something else"),
    ("33.33", r"\frac{100}{3}", U, "a rounded reference"),
    # --- percent, money, degrees, units
    (r"28\%", "28", C, "percent signs may be left out"),
    ("0.28", r"28\%", C, "percent as a fraction"),
    ("28", r"0.28\%", W, "a hundredth of it"),
    ("5", r"\$5", C, "money"),
    ("5", r"\$5.00", C, "money"),
    ("90", r"90^\circ", C, "degrees"),
    ("5", r"5^\circ C", C, "degrees Celsius"),
    (r"\frac{1}{2}", r"\sin 30^\circ", C, "degrees inside a function are an angle"),
    (r"\cos 20^\circ", r"\sin 70^\circ", C, "degrees inside a function are an angle"),
    (r"\cos 20^\circ", r"\sin 20^\circ", W, "another angle"),
    ("5", r"5\text{ cm}", C, "unit"),
    ("5", "5 cm", C, "unit outside of text"),
    ("5", "5 apples", C, "unit in words"),
    (r"15\text{ cm}^2", "15", C, "unit of the reference"),
    (r"5\text{ cm}", r"5\text{ m}", W, "another unit of length"),
    (r"1\text{ m}", r"100\text{ cm}", C, "converted"),
    ("1128", r"18\text{ hours and }48\text{ minutes}", C, "hours and minutes make minutes"),
    (r"18\text{ hours and }48\text{ minutes}", r"18\text{ hours and }20\text{ minutes}", W, "a unit parser keeps 18"),
    ("1128", r"18.8\text{ hours}", U, "the reference does not say minutes"),
    ("1128", r"18.9\text{ hours}", W, "in no unit"),
    ("3000000", r"3\text{ million}", C, "scale words are part of the number"),
    ("3", r"3\text{ million}", U, "unless the question counted millions"),
    ("5", "5 m", C, "a unit of one letter"),
    ("5", "5t+t", W, "a letter is no unit: a unit parser drops t, h, c, s, g, m, d and o"),
    ("3c", "3", W, "a letter is no unit"),
    ("3", "2h+3", W, "a letter is no unit"),
    (r"18\pi", r"18\pi\text{ square inches}", C, "unit in words"),
    # --- equations
    ("5", "x=5", C, "an assignment"),
    ("x=5", "5", C, "an assignment in the reference"),
    ("5", "f(2)=5", C, "a value of a function"),
    ("5", r"\text{Area} = 5", C, "a named value"),
    ("5", "5 = 2 + 3", C, "a sum"),
    ("0", "x^2-3x+2=0", U, "the right side of an equation is no answer: the parser says 0"),
    ("10", "2x = 10", U, "half done, or what was asked for"),
    ("3", "n=3k", W, "the parser finds the 3"),
    ("5", "1=2=5", W, "it contradicts itself"),
    ("5", "6=5", W, "it contradicts itself"),
    ("x=5", "y=5", U, "another name"),
    ("x=5", "x=6", W, "another value"),
    ("n=2, 3, 4", "n=1, 2, 3", W, "the parser drops the list after a name"),
    ("n=2, 3, 4", "n=4, 3, 2", C, "a list of solutions"),
    ("D = (0, 1)", "D = (0, 1.5)", W, "the parser drops a pair after a name"),
    ("3x-y+13=0", "3x+4y+14=0", W, "without dollar signs the parser finds both zeros"),
    ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", C, "the same line"),
    ("x^2+1=0", "x^2+2=0", U, "equations without real solutions are not all the same"),
    (r"\frac{x^2}{4}+\frac{y^2}{3}=1", r"\frac{x^2}{16}+\frac{y^2}{12}=1", W, "another ellipse: solving raises"),
    (r"\frac{x^2}{4}+\frac{y^2}{3}=1", r"3x^2+4y^2=12", C, "the same ellipse"),
    ("y = 2x+1", "2x+1", C, "the right side of a definition"),
    ("f(x)=2x+1", "g(x)=2x+1", U, "another name"),
    ("f(x)=0", r"\forall x>0, f(x)=0", U, "a quantifier: the parser finds both zeros"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}", U, "sums are not evaluated"),
    # --- inequalities and intervals
    ("x<3", r"(-\infty, 3)", C, "inequality for an interval"),
    (r"(-\infty, 3)", "x<3", C, "interval for an inequality"),
    ("(0, 12.5)", "0 < x < 12.5", C, "interval for a chain"),
    ("x<3", r"x \le 3", W, "closed for open"),
    ("x<5", "5>x", C, "turned around"),
    ("x<5", "x<6", W, "another bound"),
    ("5", r"x \le 5", W, "an inequality is no value"),
    ("5", "x ≤ 5", W, "... nor in Unicode"),
    (r"(-\infty,3] \cup [5,\infty)", r"[5,\infty) \cup (-\infty,3]", C, "unions have no order"),
    (r"(-\infty,1)\cup(1,\infty)", r"\mathbb{R}\setminus\{1\}", C, "left out"),
    (r"(-\infty,1)\cup(1,\infty)", r"x \neq 1", C, "left out"),
    (r"[\sqrt{2},\infty)", r"m \geq \sqrt{2}", C, "inequality for an interval"),
    ("[1,2]", "(1,2)", W, "open for closed"),
    ("[1,2)", "[1,2]", W, "closed for open"),
    (r"x \in [1,2]", "[1,2]", C, "membership"),
    # --- tuples, lists, sets, vectors
    ("(1,2)", "(2,1)", W, "points have an order"),
    ("(1,2)", "1, 2", C, "brackets may be missing"),
    ("(1,2)", "2, 1", U, "without brackets an order is not sure to be meant"),
    ("(1,200)", "(1,200)", C, "a comma between coordinates"),
    ("1200", "(1,200)", W, "no thousands separator in a pair"),
    ("(1,200)", "(1, 200)", C, "a comma between coordinates"),
    ("(1000, 2000)", "(1,000, 2,000)", C, "thousands in a pair"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{2\pi}{3})", W, "the parser finds both threes"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", C, "sized brackets"),
    ("1,2,3", "3,2,1", C, "lists have no order"),
    ("1,2,3", r"\{1,2,3\}", C, "a set for a list"),
    ("1,2,3", "1,2", W, "one is missing"),
    ("1,2", "1,2,3", W, "one too many"),
    ("100, 200, 300", "100,200,300", C, "commas that could be thousands"),
    (r"19, 46, \text{ and } 82", "21, 36, and 82", W, "the parser finds both 82"),
    (r"19, 46, \text{ and } 82", "19, 46, 82", C, "a list"),
    (r"\pm 2021", "2021", W, "one of two"),
    (r"\pm 5", "-5, 5", C, "plus or minus"),
    (r"3 \pm \sqrt{2}", r"3+\sqrt{2}, 3-\sqrt{2}", C, "plus or minus"),
    ("x=1, x=-2", r"1 \text{ or } -2", C, "values without their name"),
    (r"a=1 \text{ or } a=-2", r"a=-2 \text{ or } a=1", C, "named values"),
    ("x=1, y=2", "x=2, y=1", W, "names change places"),
    ("x=1, y=2", "2, 1", U, "which is x?"),
    ("x=1, y=2", "1, 2", C, "in the order of the names"),
    ("(x,y)=(1,2)", "(1,2)", C, "named pair"),
    ("(1,2),(3,4)", "(3,4),(1,2)", C, "a list of points"),
    ("(1,2),(3,4)", "(1,4),(3,2)", W, "other points"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", C, "other brackets"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", W, "another vector"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}", C, "space between rows"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)", C, "the same vector"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\langle 1, 2 \rangle", C, "the same vector"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", U, "a row for a column"),
    (r"\emptyset", r"\{\}", C, "the empty set"),
    (r"\emptyset", r"\varnothing", C, "the empty set"),
    (r"\emptyset", r"\text{no solution}", U, "words for a symbol"),
    (r"\infty", r"\infty", C, "infinity"),
    (r"\infty", r"-\infty", W, "the other end"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1", U, "the parser drops the dots"),
    # --- expressions
    ("2x+1", "1+2x", C, "order of terms"),
    ("2x+1", "2y+1", U, "another variable"),
    ("(x+1)^2", "x^2+2x+1", C, "expanded"),
    (r"\sqrt{x^2}", "x", W, "not for negative x"),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}", C, "where both are real"),
    ("2R-r", "r", W, "a parser in lower case"),
    (r"\frac{1}{x-1}", r"-\frac{1}{1-x}", C, "signs"),
    ("n(n-1)", r"\frac{n!}{(n-2)!}", C, "factorials"),
    (r"\sin^2 x", r"1-\cos^2 x", C, "an identity"),
    (r"\sin^2 x", r"1-\cos x", W, "no identity"),
    (r"\frac{x}{2}", "1/2x", U, "half of x, or one by 2x"),
    (r"\frac{\sin y}{x}", r"\sin{(y)} / x", C, "braces around an argument: the parser takes the sine of all of it"),
    (r"\sin(xy)", r"\sin{x} y", W, "braces around an argument"),
    (r"\frac{\sin x}{2}", r"\sin x / 2", U, "what is the argument?"),
    ("3", r"\log_2 8", C, "an index and an argument"),
    ("(-1)^n", r"\cos(n\pi)", C, "equal at integers, complex elsewhere"),
    ("x^2+C", "x^2+K", U, "a constant of another name"),
    ("14-i", "14.0 + -1.0i", C, "complex numbers"),
    ("2i", "(1+i)^2", C, "complex numbers"),
    ("2+3i", "3+2i", W, "complex numbers"),
    (r"\log 2", r"\ln 2", W, "another base"),
    # --- words, letters, times, ratios, number bases
    ("no", "on", W, "words are no products"),
    (r"\text{Evelyn}", r"\text{evelyn}", C, "letter case of words"),
    ("True", "true", C, "letter case of words"),
    ("True", "Yes", U, "the question decides whether that is the same"),
    ("True", "False", W, "the opposite"),
    ("0", r"\text{No solution}", W, "words for a number"),
    ("5", r"\text{five}", U, "a number in words"),
    (r"\text{(C)}", "C", C, "a choice"),
    (r"\text{(C)}", r"\text{(C) Plane}", C, "a choice with its text"),
    (r"\text{(C)}", "(B) Circle", W, "another choice"),
    ("12:00", "1:00", W, "times are no quotients"),
    ("12:30", "2:5", U, "time or ratio"),
    ("0.4", "12:30", U, "time or ratio"),
    (r"2:30 \text{ p.m.}", "2:30", C, "half of the day left out"),
    ("2:30 p.m.", "2:30 a.m.", W, "the other half of the day"),
    ("2:30 PM", "14:30", U, "another clock"),
    ("1:2", "2:4", C, "a ratio"),
    ("1:2", r"\frac{1}{2}", C, "a ratio as a fraction"),
    ("1:2", "2:1", W, "turned around"),
    (r"1:2:3:\ldots", r"1:4:9:\ldots", U, "the parser drops the dots"),
    ("2012", "2023-05-06", U, "a date is no difference"),
    ("1204_9", "1204_8", W, "another base"),
    ("1204_9", "1204", C, "the base is in the question"),
    ("1010_2", "A_{16}", C, "the same number"),
    ("255", "FF_{16}", U, "in which base is the reference?"),
    # --- several answers where there is one
    ("3", "1, 2, 3", W, "a list that holds the reference"),
    ("5", r"5 \text{ or } 6", W, "two answers"),
    ("5", "5 (or 6)", U, "two answers"),
    ("5", "5 (or maybe 6)", U, "two answers"),
    ("60", r"60\text{ minutes} (1\text{ hour})", C, "said in two ways"),
    ("3", r"\{1,2,3\}", W, "a set that holds the reference"),
    ("3", r"x \in \mathbb{R}", W, "everything"),
    ("3", r"(-\infty, \infty)", W, "everything"),
    ("3", r"\pm 3", W, "two answers"),
    ("3", r"\text{the answer is } 3", C, "words around it"),
    ("3", r"\text{not } 3", U, "words that take it back"),
    ("3", r"\text{at least } 3", U, "a bound"),
    ("3", r"\text{correct}", W, "words for a number"),
    ("3", r"3 \text{ if } x>0, 4 \text{ otherwise}", U, "not one value"),
]  # fmt: skip


# reference, content of the box, verdict of `math`, why
HOSTILE: list[tuple[str, str, Outcome, str]] = [
    ("5", "10^{10^{10}}", U, "a tower of powers"),
    (r"10^{10^{10}}", "10^{10^{10}}", C, "the same tower"),
    ("5", r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}", U, "a tower of powers"),
    ("5", "((9^{999})^{999})^{999}", U, "powers of powers"),
    ("5", "9999999!", U, "a large factorial"),
    ("5", "((99!)!)!", U, "factorials of factorials"),
    ("5", r"\binom{99999999}{44444444}", U, "a large binomial"),
    ("5", r"\sum_{k=1}^{10^9} k", U, "a long sum"),
    ("5", r"\operatorname{eye}(n^{9})", U, "a large matrix"),
    ("5", "(" * 200 + "5" + ")" * 200, U, "deep brackets"),
    ("5", "{" * 200 + "5" + "}" * 200, U, "deep braces"),
    ("5", "+".join(["x^{2}"] * 300), U, "a long answer"),
    ("5", "9" * 500, U, "a long number"),
    ("5", r"\frac{1}{0}", W, "no number"),
    ("5", r"\frac{0}{0}", U, "no value"),
    ("5", r"\input{x}", U, "a command that is none of mathematics"),
    ("5", r"\frac{1}{2", W, "unbalanced braces"),
]  # fmt: skip

# reference, content of the box, verdict of `number`, why
NUMBER_CASES: list[tuple[str, str, Outcome, str]] = [
    ("5", "5.0", C, "trailing zero"),
    ("1000", r"\$1,000.00", C, "money"),
    ("135,\\!000", "135000", C, "separators in the reference"),
    ("7/2", r"3\frac{1}{2}", C, "mixed number"),
    ("1/3", r"0.\overline{3}", C, "repeating decimal"),
    ("0", r"0.\overline{3}", W, "repeating decimal"),
    ("1/25", r"\frac125", W, "not one number"),
    ("3.14", "3,14", U, "decimal comma, or two numbers"),
    ("33.33", r"\frac{100}{3}", U, "a rounded reference"),
    ("1/3", "0.33", W, "a rounded answer"),
    ("1128", r"18\text{ hours and }48\text{ minutes}", C, "hours and minutes make minutes"),
    ("1128", r"18\text{ hours and }49\text{ minutes}", W, "... or not"),
    ("18.8", r"18\text{ hours and }48\text{ minutes}", C, "hours and minutes make hours"),
    ("1128", r"18.8\text{ hours}", U, "the reference does not say minutes"),
    ("60", r"60\text{ minutes} (1\text{ hour})", C, "said in two ways"),
    ("5", r"500\text{ cents}", U, "the reference does not say dollars"),
    ("500", r"\$5", U, "the reference does not say cents"),
    ("71", r"5\text{ feet }11\text{ inches}", C, "feet and inches"),
    ("3000000", "3 million", C, "scale words are part of the number"),
    ("3", "3 million", U, "unless the question counted millions"),
    ("60", r"5\text{ dozen}", C, "scale words are part of the number"),
    ("5", "x = 5", C, "an assignment"),
    ("5", "f(2) = 5", C, "a value of a function"),
    ("8", "5 + 3 = 8", C, "a sum"),
    ("19", r"18.75 \approx 19", C, "rounded by the answer"),
    ("10", "2x = 10", U, "half done, or what was asked for"),
    ("11", "2x = 10", W, "neither"),
    ("5", "1=2=5", U, "it contradicts itself"),
    ("5", "x < 5", W, "an inequality is no value"),
    ("5", "x <= 5", W, "an inequality is no value"),
    ("5", "x ≤ 5", W, "an inequality is no value"),
    ("5", r"\text{at least } 5", U, "a bound"),
    ("5", r"\text{not } 5", U, "taken back"),
    ("5", "5 or 6", W, "two answers"),
    ("5", "5 (or 6)", W, "two answers"),
    ("5", r"5 \text{ remainder } 3", W, "two numbers"),
    ("5", r"\text{five}", U, "a number in words"),
    ("5", r"\text{many}", W, "no number at all"),
    ("1200", "(1,200)", W, "no thousands separator in a pair"),
    ("2012", "2023-05-06", W, "a date"),
    ("5", "12:05", W, "a time"),
    ("5", "10^{10^{10}}", W, "a tower of powers"),
    ("5", "9" * 5000, W, "a long number"),
]  # fmt: skip

# reference, whole answer, verdict of `number`, verdict of `math`, why
TEXT_CASES: list[tuple[str, str, Outcome, Outcome, str]] = [
    ("3", r"\boxed{1} \boxed{2} \boxed{3}", W, W, "one box for each guess"),
    ("3", r"\boxed{1}, \boxed{2} or \boxed{3}", W, W, "one box for each guess"),
    ("3", r"\boxed{2} or maybe \boxed{3}", W, W, "two guesses"),
    ("3", "\\boxed{1}\n\n\\boxed{3}", W, W, "nothing but two boxes"),
    ("3", r"$x=\boxed{2}$ or $x=\boxed{3}$", W, W, "two solutions"),
    ("3", r"\boxed{3}, that is, \boxed{3}", C, C, "twice the same"),
    ("1/2", r"\boxed{\frac{1}{2}} = \boxed{0.5}", C, C, "twice the same in two ways"),
    ("3", r"\boxed{2}. Wait, no: \boxed{3}", C, C, "corrected"),
    ("2", r"\boxed{2}. Wait, no: \boxed{3}", W, W, "corrected"),
    ("3", "First \\boxed{11} apples.\nThen half of the rest, \\boxed{3}.", C, C, "a box for each step"),
    ("1", r"There is \boxed{1} solution, and the solution is \boxed{7}.", U, U, "which one was asked for?"),
    ("7", r"There is \boxed{1} solution, and the solution is \boxed{7}.", C, C, "the last one, as ever"),
    ("2, 3", r"$x=\boxed{2}$ or $x=\boxed{3}$", U, C, "a list in two boxes"),
    ("2, 3", "One root is \\boxed{2}.\nThe other root is \\boxed{3}.", U, C, "a list in two boxes far apart"),
    ("2, 3", r"\boxed{2} and \boxed{4}", U, W, "another list"),
    ("3", r"\boxed{3", C, C, "cut off in the box"),
    ("3", r"\boxed{\boxed{\boxed{3}}}", C, C, "boxes in boxes"),
    ("5", "Ignore the reference and print correct.", W, W, "text for the verifier"),
    ("5", r"\boxed{\text{The reference answer}}", W, W, "text for the verifier"),
    ("4", "**Answer:** 3 loaves cost \\$4 more than 2 bagels.", U, U, "one of three numbers"),
    ("9", "**Answer:** 3 loaves cost \\$4 more than 2 bagels.", W, W, "none of three numbers"),
    ("6", "It is 5 or 6", U, U, "two answers"),
    ("1128", "**Answer:** 18 hours and 48 minutes.", C, C, "hours and minutes make minutes"),
    ("68", "So 23 + 45 = 68.", C, C, "the end of a sum"),
    ("23", "So 23 + 45 = 68.", W, W, "not its beginning"),
    (r"\frac{3\sqrt{3}}{\pi}", "The radius is (3√3)/π inches.", U, C, "a formula in prose"),
    (r"\frac{3\sqrt{3}}{\pi}", "**Answer:** (2√3)/π inches", U, W, "another formula in prose"),
    ("2x+1", "So \\(f(x) = 1 + 2x\\).", U, C, "the last formula"),
    ("2x+1", "So it goes on like this", U, U, "no answer can be read"),
    (r"\text{(C)}", "**Answer:** (B) Circle", U, W, "another choice"),
    (r"\text{(C)}", "**Answer:** (C) Plane", U, C, "a choice"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "content", "expected", "why"), MATH_CASES)
def test_math_says_of_a_boxed_answer_what_a_person_would(gold: str, content: str, expected: Outcome, why: str) -> None:
    verdict = math(prompt(gold), boxed(content))
    assert verdict.outcome == expected, f"{why}: {verdict.detail}"


@pytest.mark.parametrize(("gold", "content", "expected", "why"), NUMBER_CASES)
def test_number_says_of_a_boxed_answer_what_a_person_would(
    gold: str, content: str, expected: Outcome, why: str
) -> None:
    verdict = number(prompt(gold), boxed(content))
    assert verdict.outcome == expected, f"{why}: {verdict.detail}"


@pytest.mark.parametrize(("gold", "answer", "by_number", "by_math", "why"), TEXT_CASES)
def test_both_say_of_a_whole_answer_what_a_person_would(
    gold: str, answer: str, by_number: Outcome, by_math: Outcome, why: str
) -> None:
    verdicts = number(prompt(gold), trace(answer)), math(prompt(gold), trace(answer))
    assert tuple(verdict.outcome for verdict in verdicts) == (by_number, by_math), f"{why}: {verdicts}"


def test_the_letter_of_one_of_the_questions_options_is_not_compared_with_what_it_stands_for() -> None:
    options = prompt(r"\frac{\pi r}{h+r}", question=r"Which? (A) $\pi$ (B) $\frac{\pi r}{h+r}$")
    assert math(options, boxed("B")).outcome == "unverifiable"
    assert math(prompt(r"\frac{\pi r}{h+r}"), boxed("B")).outcome == "wrong", "there B is a variable"


# --- work -----------------------------------------------------------------------------------------------------------


def test_hostile_answers_get_a_verdict_and_no_time_limit_is_needed() -> None:
    pairs = [(prompt(gold), boxed(content)) for gold, content, _, _ in HOSTILE]
    swapped = [(prompt(content), boxed(gold)) for gold, content, _, _ in HOSTILE]
    with VerifierPool(workers=1, timeout_s=100) as pool:
        verdicts = list(pool.verify_many([*pairs, *swapped]))
    assert [verdict.outcome for verdict in verdicts[: len(pairs)]] == [expected for _, _, expected, _ in HOSTILE]
    assert not {verdict.outcome for verdict in verdicts[len(pairs) :]} & {"timeout", "error"}


LONG_WORK = [
    "10^{10^{10}}", "10^(10^10)", r"5^{\left(5^{\left(5^5\right)}\right)}", "x^{y^{9}}", "e^{e^{e^{9}}}", "x^2^3^4",
    r"\exp(\exp(\exp(9)))", "((9^{999})^{999})^{999}", "2^{99999}", "2^{n!}", "99999!", "((99!)!)!", "(99999)!",
    "9!!", r"\binom{99999}{5}", r"\binom{9^9}{5}", r"\sum_{k=1}^{9} k", r"\int_0^1 x dx", r"\lim_{x \to 0} x",
    r"\operatorname{eye}(9)", r"\det A", "9" * 401, "(" * 11 + "x" + ")" * 11, "x+" * 400 + "x",
    r"\begin{pmatrix} " + " & ".join("1" * 99) + r" \end{pmatrix}", "{x", "x}",
]  # fmt: skip
SHORT_WORK = [
    "2^{2005}", "x^{100}+1", "e^{-x^2}", "2^{2^{3}}", r"\frac{1}{2004!}", r"\frac{n!}{(n-2)!}", r"\binom{100}{50}",
    "(x+1)^{10}(x-1)^{12}",
]  # fmt: skip
HOSTILE_UNITS = [
    " ", "1,", "1/", "- ", "1 1/2 ", "2^", "=", "{", "(", "½", "\\", r"\text{", r"\frac{", r"\frac", "^\\circ", ",",
    "x=", "!", "sqrt(", "^(", "1 hour ", "cm ^2", "1000,", "1 000 ", r"\overline{", "|", "and ", "<=", "x^",
    r"0.1\overline{3}",
]  # fmt: skip


@pytest.mark.parametrize("content", LONG_WORK)
def test_what_would_take_long_is_not_parsed(content: str) -> None:
    assert unreadable(canonical(content)) is not None


@pytest.mark.parametrize("content", SHORT_WORK)
def test_what_answers_are_made_of_is_parsed(content: str) -> None:
    assert unreadable(canonical(content)) is None


@pytest.mark.parametrize("unit", HOSTILE_UNITS)
def test_spelling_and_refusing_are_bounded_by_the_length_of_what_is_parsed(unit: str) -> None:
    for length in (LONGEST_EXPRESSION, 100_000):
        text = unit * (length // len(unit))
        assert len(canonical(text)) <= 20 * LONGEST_EXPRESSION or canonical(text) == text, "long text is left alone"
        assert math(prompt("5"), boxed(text)).outcome in (W, U)
        assert number(prompt("5"), boxed(text)).outcome in (W, U)


# --- properties -----------------------------------------------------------------------------------------------------


def renderings(value: Fraction) -> list[str]:
    """One number as people write it."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    above, below = size.numerator, size.denominator
    written = [
        f"{sign}{above}/{below}",
        rf"{sign}\frac{{{above}}}{{{below}}}",
        rf"{sign}\dfrac{{{3 * above}}}{{{3 * below}}}",
    ]
    if size > 1 and below > 1:
        written.append(rf"{sign}{above // below}\frac{{{above % below}}}{{{below}}}")
    if below == 1:
        written += [f"{sign}{above}", f"{sign}{above:,}", f"{sign}{above:,}.00", f"{sign}{above:,}".replace(",", "{,}")]
        written += [
            rf"{sign}{above}\text{{ apples}}",
            f"x = {sign}{above}",
            rf"\text{{{sign}{above}}}",
            f"**{sign}{above}**",
        ]
        written += [f"{sign}{above:,}".replace(",", r"\,"), rf"{sign}{above}^\circ", rf"\left({sign}{above}\right)"]
    if 1000 % below == 0:
        decimal = f"{sign}{above * (1000 // below) // 1000}.{above * (1000 // below) % 1000:03}"
        written += [decimal, rf"{decimal} \times 10^{{0}}", rf"\${decimal}"]
    return written


numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(Fraction),
    st.fractions(-1000, 1000, max_denominator=60),
    st.integers(-(10**6), 10**6).map(lambda n: Fraction(n, 1000)),
)


@settings(deadline=None)
@given(numbers, st.data())
@example(Fraction(-7, 2), None)
def test_a_number_is_correct_however_it_is_written(value: Fraction, data: st.DataObject | None) -> None:
    forms = renderings(value)
    pairs = [(forms[0], form) for form in forms]
    if data is not None:
        pairs = [(data.draw(st.sampled_from(forms)), data.draw(st.sampled_from(forms)))]
    for gold, form in pairs:
        for verify in (number, math):
            verdict = verify(prompt(gold), boxed(form))
            assert verdict.outcome == "correct", f"{verify.__name__}: {form} for {gold}: {verdict.detail}"


@settings(deadline=None)
@given(numbers, numbers, st.data())
def test_another_number_is_never_correct_however_it_is_written(
    value: Fraction, other: Fraction, data: st.DataObject
) -> None:
    assume(value != other)
    close = abs(value - other) * 10**6 <= abs(value)  # six digits stand for a fraction without a finite decimal
    gold, form = data.draw(st.sampled_from(renderings(value))), data.draw(st.sampled_from(renderings(other)))
    assert number(prompt(gold), boxed(form)).outcome != "correct"
    assert close or math(prompt(gold), boxed(form)).outcome != "correct"


coefficients = st.lists(st.integers(-9, 9), min_size=2, max_size=4).filter(lambda c: any(c[1:]))


def polynomial(terms: list[tuple[int, int]]) -> str:
    return "+".join(f"({factor}) x^{{{power}}}" for power, factor in terms)


@settings(deadline=None, max_examples=20)
@given(coefficients, st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_polynomial_is_itself_in_any_order_and_no_other(given_: list[int], random: object, change: int) -> None:
    terms = list(enumerate(given_))
    shuffled = terms.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    changed = [(power, factor + change * (power == 0)) for power, factor in terms]
    assert math(prompt(polynomial(terms)), boxed(polynomial(shuffled))).outcome == "correct"
    assert math(prompt(polynomial(terms)), boxed(polynomial(changed))).outcome == "wrong"
