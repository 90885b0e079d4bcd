"""What MkDocs does not do by itself: notebooks, and the pages that lie above docs/, are pages too.

Notebooks are shown as they are stored, outputs and all; they are run by the tests. In the sources,
links go to `../notebooks/x.ipynb` and `../CONTRIBUTING.md`, as a reader of the files would follow
them; here they are turned to where those pages are in the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks, with their pictures, and the pages above docs/."""
    root = Path(config.config_file_path).parent
    for source, page in ABOVE.items():
        text = (root / source).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(notebook))
        pictures = resources["outputs"]
        for name in pictures:
            text = text.replace(f"]({name})", f"](images/{notebook.stem}/{name})")
        for name, picture in pictures.items():
            path = f"tutorials/images/{notebook.stem}/{name}"
            files.append(File.generated(config, path, content=picture))
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to notebooks and to the pages above docs/ to their places in the site."""
    del config, files
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(
        r"\]\((?:\.\./)*(?:notebooks/)?(\d\d_\w+)\.ipynb", rf"]({up}tutorials/\1.md", markdown
    )
    for source, target in ABOVE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({up}{target}", markdown)
    return markdown
