"""Whether `make test-all` passed with just this content.

    python -m tests.content            exit code 0 if it did, 1 if anything that tests depend on has changed since
    python -m tests.content --record   notes that it did, for the next commit

The note, `tests/passed.txt`, is the SHA-256 of every tracked file below `DEPENDED_ON`, names and bytes; versions of packages count
by constraints.txt.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = Path("tests/passed.txt")
DEPENDED_ON = ("lavender", "csrc", "recipes", "tests", "bench", "examples", "pyproject.toml", "setup.py", "constraints.txt")


def fingerprint() -> str:
    """The content's SHA-256, 64 hexadecimal digits; new files count once git knows them."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *DEPENDED_ON], cwd=ROOT, capture_output=True, check=True)
    digest = hashlib.sha256()
    for name in sorted(listed.stdout.decode().split("\0")):
        if name and Path(name) != NOTE and (ROOT / name).is_file():
            data = (ROOT / name).read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def main() -> int:
    if sys.argv[1:] == ["--record"]:
        (ROOT / NOTE).write_text(fingerprint() + "\n")
        return 0
    passed = (ROOT / NOTE).is_file() and (ROOT / NOTE).read_text().strip() == fingerprint()
    print(
        "the whole suite passed with this content"
        if passed
        else "content that tests depend on has changed since the whole suite passed"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
