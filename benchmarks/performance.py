"""Every CPU table of docs/performance.md in one run of about ten minutes.

    python -m benchmarks.performance OUT [--peer-python PEER/bin/python] [--quick]

The projector on all cores and on one beside the dense sums, then the training step beside cryoDRGN, its memory and the growth
of its cost. OUT gets what the two benchmarks write, and performance.md, the tables in the order of that page.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import projector, step
from benchmarks.igg import CTF_TABLE, MODEL


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the results.")],
    peer_python: Annotated[Path | None, typer.Option(help="Python of an environment with cryoDRGN.")] = None,
    model: Annotated[Path, typer.Option(help="PDB or mmCIF file of 1HZH.")] = MODEL,
    ctf_table: Annotated[Path, typer.Option(help=".npy of CTF rows to draw from.")] = CTF_TABLE,
    quick: Annotated[bool, typer.Option(help="Small sizes, few rounds: a look, not a measurement.")] = False,
) -> None:
    """Run both benchmarks and join their tables."""
    projector.main(out, quick=quick)
    projector.main(out / "one-core", quick=quick, rounds=9, threads=1, compiled=False)
    step.main(out, peer_python, model, ctf_table, quick=quick, rounds=1 if quick else 3)
    pages = [out / "projector.md", out / "one-core" / "projector.md", out / "step.md"]
    (out / "performance.md").write_text("\n".join(page.read_text() for page in pages))


if __name__ == "__main__":
    typer.run(main)
