"""Builds the documentation: ``python docs/build.py`` (make docs). Warnings are errors.

The pages of this version go to build/docs/VERSION. Beside the folders of all versions that were built there,
switcher.json lists them for the version switch, and index.html leads to the newest one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_switcher(folder: Path, base: str) -> list[dict]:
    """List the versions whose pages are in the folder, the newest first, and return the list.

    Args:
        folder: where each version has a folder of its own.
        base: the address under which this folder is served: "/", or "https://host/path/".
    """
    built = [path.parent.parent.name for path in folder.glob("*/docs/index.html")]
    versions = sorted(built, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], reverse=True)
    entries = [
        {
            "version": version,
            "name": f"{version} (newest)" if version == versions[0] else version,
            "url": f"{base}{version}/",
        }
        for version in versions
    ]
    entries[0]["preferred"] = True
    (folder / "switcher.json").write_text(json.dumps(entries, indent=2) + "\n")
    _write_redirect(folder, f"{versions[0]}/docs/index.html")
    return entries


def _write_redirect(folder: Path, target: str) -> None:
    page = f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={target}"><a href="{target}">lcw_ops</a>\n'
    (folder / "index.html").write_text(page)


def main() -> int:
    try:
        import myst_parser  # noqa: F401
        import pydata_sphinx_theme  # noqa: F401
        import sphinx  # noqa: F401
    except ImportError as error:
        print(f"{error}. The documentation needs Python >= 3.11, and pip install 'lcw-ops[docs]'.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    import lcw_ops

    folder = ROOT / "build/docs"
    output = folder / lcw_ops.__version__
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-E", "-q", "-b", "html", "-c", str(ROOT / "docs")]
    command += ["-d", str(ROOT / "build/doctrees"), *sys.argv[1:], str(ROOT), str(output)]
    if status := subprocess.run(command).returncode:
        return status
    # The version switch leads here if the other version does not have the reader's page.
    _write_redirect(output, "docs/index.html")
    write_switcher(folder, os.environ.get("LCW_OPS_DOCS_URL", "/"))
    print(f"Open {output / 'docs/index.html'}, or serve all versions: python -m http.server -d build/docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
