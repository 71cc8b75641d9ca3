"""Pre-trained weights without an hour of pre-training: the folder that pretrain.py writes, from pretrained.safetensors.

    python examples/shapes/unpack.py --output shapes-sd

Weights were rounded to 8 bits; finetune.py and analysis.py start from them as from their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pack import PRETRAINED, copy_of
from safetensors.torch import save_file
from script import require, run_script

from vpd_fast import bundled
from vpd_fast.checkpoints import reader
from vpd_fast.files import write_files


def unpack(source: Path, folder: Path) -> None:
    """Write sd.safetensors, report.json, text_encoder/ and tokenizer/. Raises CheckpointError."""
    raw = reader.read_file(source)
    tensors, record = bundled.unpack(raw.tensors), str(raw.metadata.get(bundled.RECORD, "{}"))
    text = bundled.asset(bundled.TEXT_ENCODER)
    with bundled.unpacked_folder(text / "text_encoder") as encoder:
        sources = {f"text_encoder/{path.name}": path for path in encoder.iterdir()}
        sources |= {f"tokenizer/{path.name}": path for path in (text / "tokenizer").iterdir()}
        copies = {folder / name: copy_of(path) for name, path in sources.items()}
        write_files(
            {
                **copies,
                folder / "sd.safetensors": lambda path: save_file(tensors, path),
                folder / "report.json": lambda path: path.write_text(record, encoding="utf-8"),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("shapes-sd"))
    options = parser.parse_args()
    require(PRETRAINED, "python examples/shapes/pack.py, after pretrain.py and finetune.py")
    unpack(PRETRAINED, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(run_script(main))
