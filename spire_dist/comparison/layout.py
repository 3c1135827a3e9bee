"""Where a set with known truth has its particles: the benchmark's released layout, or what `simulate` writes.

images/**/sorted_particles.*.txt, or particles.star   combined_poses.pkl   combined_ctfs.pkl
(the truth beside them is `results.truth`'s)
"""

from dataclasses import dataclass
from pathlib import Path

from spire_dist.errors import SourceError


@dataclass(frozen=True)
class ParticleFiles:
    """What a set's store is prepared from, and what cryoDRGN reads."""

    particles: Path
    """RELION .star with poses and CTFs of its own, or a .txt list of stacks."""
    poses: Path | None
    """The pickle, where it is there."""
    ctf: Path | None

    @property
    def needs_pickles(self) -> bool:
        """Whether the particle file says nothing of poses and CTFs."""
        return self.particles.suffix.lower() != ".star"

    def pickles(self, rival: str) -> tuple[Path, Path]:
        """Those of poses and CTFs, which a rival cannot do without. Raises SourceError."""
        if self.poses is None or self.ctf is None:
            raise SourceError(
                f"{self.particles}: combined_poses.pkl and combined_ctfs.pkl are not both there; {rival} needs them"
            )
        return self.poses, self.ctf


def find_particles(data: Path, particles: Path | None = None) -> ParticleFiles:
    """The particle files of a set; `particles` names the file where there are several. Raises SourceError."""
    if not data.is_dir():
        raise SourceError(f"{data}: no such folder; give a set with known truth, as `spire-dist simulate` makes it")
    if particles is None:
        star = data / "particles.star"
        found = [star] if star.exists() else sorted((data / "images").rglob("sorted_particles*.txt"))
        if not found:
            raise SourceError(f"{data}: neither particles.star nor images/*/sorted_particles.*.txt in it")
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(data)) for path in found)
            raise SourceError(f"{data}: {len(found)} lists of particles ({names}); choose one with --particles")
        particles = found[0]
    pickles = [data / "combined_poses.pkl", data / "combined_ctfs.pkl"]
    files = ParticleFiles(particles, *(path if path.exists() else None for path in pickles))
    if files.needs_pickles and None in (files.poses, files.ctf):
        missing = next(path for path in pickles if not path.exists())
        raise SourceError(f"{missing}: no such file; {particles.name} lists stacks only, so it needs poses and CTFs")
    return files
