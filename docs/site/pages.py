"""The pages of the site that are no Markdown files of `docs/`: the README, the changelog, the rules for contributors, and the notebooks.

mkdocs calls `on_files` (see `hooks` in `mkdocs.yml`) once, before it reads a page. Their links lead from the root of the repository, and
become links between pages here; mkdocs then checks all of them.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root, and the pages that they become. `docs/README.md`, the list of all pages, becomes `pages.md`."""
FIRST_TUTORIAL = "tutorials/features_of_your_scan.md"
"""Where links to the folder of notebooks lead."""


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made from other files.

    Args:
        files: What mkdocs found in `docs/`.
        config: The settings of the site.

    Returns:
        The files, with the added pages.
    """
    from mkdocs.structure.files import File

    listed = files.get_file_from_path("README.md")
    assert listed is not None, "docs/README.md, the list of all pages, is missing"
    files.remove(listed)
    made = {page: as_page((ROOT / name).read_text()) for name, page in NAMES.items()}
    made["pages.md"] = (ROOT / "docs" / "README.md").read_text().replace("](tutorials)", f"]({FIRST_TUTORIAL})")
    for notebook in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        made[f"tutorials/{notebook.stem}.md"] = notebook_as_page(json.loads(notebook.read_text()))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def as_page(text: str) -> str:
    """Turn the links of a file in the repository's root into links of a page.

    Args:
        text: Markdown whose links lead from the root.

    Returns:
        Markdown whose links lead from the first page of the site.
    """

    def moved(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        others = {"docs/README.md": "pages.md", "docs/tutorials": FIRST_TUTORIAL}
        return f"]({(NAMES | others).get(path, path.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]*)?\)", moved, text)


def notebook_as_page(notebook: dict[str, Any]) -> str:
    """Write a notebook as Markdown: its texts, its code, and the outputs that are stored in it.

    Args:
        notebook: The parsed `.ipynb` file, in format 4.

    Returns:
        Markdown. Pictures are part of the page.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output of the code above](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", [])))
                parts.append(f'```text title="Output"\n{text.rstrip()}\n```')
    return "\n\n".join(parts) + "\n"
