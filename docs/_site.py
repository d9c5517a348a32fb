"""What the site has besides docs/: pages from elsewhere in the repository, and links between all of them.

Pages are written for readers of the repository: links are paths in it. Here they become paths of the site, whose root is docs/.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "index.md": "README.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
    **{f"examples/{path.name}": f"examples/notebooks/{path.name}" for path in (ROOT / "examples/notebooks").glob("*.ipynb")},
    **{
        f"benchmarks/{path.name}": f"benchmarks/{path.name}"
        for path in (ROOT / "benchmarks").glob("*.*")
        if path.suffix in (".md", ".png")
    },
}
"""page of the site -> file of the repository"""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        new = {of: name for name, of in OUTSIDE.items()}.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(new, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)
