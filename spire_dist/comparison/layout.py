"""Where a set with known truth has its particles: the benchmark's released layout, or what `simulate` writes.

images/**/sorted_particles.*.txt, or particles.star   combined_poses.pkl   combined_ctfs.pkl
(the truth beside them is `results.truth`'s)
"""

from dataclasses import dataclass
from pathlib import Path

from spire_dist.errors import SourceError


@dataclass(frozen=True)
class ParticleFiles:
    """What a store is prepared from; poses and CTFs are None where the particle file has its own."""

    particles: Path
    poses: Path | None
    ctf: Path | None


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
    if particles.suffix.lower() == ".star":
        return ParticleFiles(particles, None, None)
    poses, ctf = data / "combined_poses.pkl", data / "combined_ctfs.pkl"
    for path in (poses, ctf):
        if not path.exists():
            raise SourceError(f"{path}: no such file; {particles.name} lists stacks only, so it needs poses and CTFs")
    return ParticleFiles(particles, poses, ctf)
