"""Draw docs/fashion.png from the tables of docs/results.md.

    python benchmarks/fashion_figure.py
"""
import re

from reference_way import ROOT  # first: it adds the project to the path

from engine.arguments import OneLineParser
from engine.errors import run_program
from engine.figures import Curve, save_comparison_figure
from models import BitWidth

CONVERGED = {  # in the tables: in the figure
    "any, recursive": "any, recursive", "any, hard": "any, hard",
    "dedicated": "dedicated: a network for each bit-width"}
SIX_EPOCHS = {
    "any, recursive": "any, recursive",
    "any, recursive, `--quantizer lsq`": "any, recursive, LSQ",
    "any, `--loss half`": "any, half",
    "any, `--loss half --quantizer lsq`": "any, half, LSQ",
    "dedicated, `--quantizer lsq`": "dedicated, LSQ",
    "dedicated 32-bit, int8 by NNCF": "32-bit, then int8 by NNCF"}
PAPER_S = {"dedicated": "dedicated, the paper's quantizer"}  # of the first table


def rows(text, names):
    """Return {name: {bit-width: (mean, standard deviation)}} of the first rows of each name.

    Rows of a single seed are left out.
    """
    found = {}
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if first == "model":
            widths = [BitWidth.of(cell) for cell in cells]
        elif first in names and first not in found:
            numbers = [re.fullmatch(r"([\d.]+) ± ([\d.]+)", cell) for cell in cells]
            found[first] = {bits: (float(number[1]), float(number[2]))
                            for bits, number in zip(widths, numbers) if number}
    return {name: cells for name, cells in found.items() if cells}


def curves(text, names):
    """Return the Curve of each of the names in the tables of a text."""
    return [Curve(names[name], {bits: mean for bits, (mean, _) in cells.items()},
                  {bits: spread for bits, (_, spread) in cells.items()},
                  {BitWidth(32)} if names[name].startswith("32-bit") else set(cells),
                  joined=not name.startswith("dedicated"))
            for name, cells in rows(text, names).items()]


def main(options):
    text = (ROOT / "docs" / "results.md").read_text()
    fashion = text.split("## Fashion-MNIST")[1].split("\n## ")[0]
    six_epochs, later = fashion.split("**30 epochs**")
    converged, others = later.split("**Other methods**")
    save_comparison_figure(options.output, [
        ("svhnq on Fashion-MNIST, 30 epochs: mean and standard deviation over three seeds",
         curves(converged, CONVERGED)),
        ("six epochs: learned step sizes (LSQ) and MBQuant's loss (half)",
         curves(others, SIX_EPOCHS) + curves(six_epochs, PAPER_S))], split="test")


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--output", default=ROOT / "docs" / "fashion.png", metavar="FILE",
                        help="the figure")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
