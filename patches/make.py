"""Write the patch and the table of seams for a checkout of Megatron-LM: ``python patches/make.py TAG PATH``.

For a version in which the tests of ``tests/frameworks`` pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_flashrecovery.patching.megatron_lm import make_patch, make_seams

FOLDER = Path(__file__).parent / "megatron_lm"


def main(tag: str, root: Path) -> None:
    patches = make_patch(root)
    (FOLDER / f"{tag}.patch").write_text("".join(patch.render() for patch in patches.values()))
    lines = [f"# The seams of Megatron-LM {tag} that recovery relies on, as they were when it was tested.\n"]
    for seam in make_seams(root):
        parameters = ", ".join(f'"{name}"' for name in seam.parameters)
        lines.append(
            f'\n[[seam]]\nfile = "{seam.file}"\nname = "{seam.name}"\n'
            f'parameters = [{parameters}]\nsha256 = "{seam.sha256}"\n'
        )
    (FOLDER / f"{tag}.toml").write_text("".join(lines))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
