"""The sources of the site in one folder: pages as they are, generated ones, and what both link to.

A page reads well in the repository, so it is plain Markdown; on the site three things become more:

* a link to a file of the repository leads to its page on the site, or, where it has none, to a copy;
* ``<!-- figure: NAME -->`` on a line of its own becomes that figure with its caption;
* ``<!-- reference -->`` in ``index.md`` becomes the list of the generated pages.

The pages are in the order in which ``index.md`` links them, under its headings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FIGURE = re.compile(r"<!-- figure: ([\w-]+) -->")
_REFERENCE = "<!-- reference -->"
_FENCE = re.compile(r"(```|~~~)")
_ELSEWHERE = re.compile(r"[a-z]+:")


class StagingError(Exception):
    """A page has a link or a figure that leads nowhere; the message has file and line."""


class Stage:
    """The folder that Sphinx reads; a file that does not change is not written again."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder, self._root = folder.resolve(), root
        self._written: set[Path] = set()
        self.reference: dict[str, str] = {}
        """Links to the generated pages with what is in them, by their names in the folder."""
        self.figures: dict[str, str] = {}
        """Captions of the figures, by name."""

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the stage."""
        path, data = self.folder / name, content.encode() if isinstance(content, str) else content
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)
        self._written.add(path)

    def add_reference(self, name: str, title: str, text: str, about: str = "") -> None:
        """Write a generated page in reStructuredText, as docstrings are.

        Args:
            name: of the file, without a suffix.
            title: its heading.
            text: what follows.
            about: what the first page says of it; without, another page of the reference leads to it.
        """
        if about:
            self.reference[name] = f"[{title}](/{name}.rst): {about}"
        self.write(f"{name}.rst", f"{title}\n{'=' * len(title)}\n\n{text}")

    def add_figure(self, name: str, svg: str, caption: str) -> None:
        """Write a picture, and beside it what is said of it."""
        self.figures[name] = " ".join(caption.split())
        self.write(f"figures/{name}.svg", svg)
        self.write(f"figures/{name}.txt", self.figures[name])

    def keep_figure(self, name: str) -> str | None:
        """Take a picture of an earlier build over and return its caption; None where there is none."""
        picture, caption = (self.folder / "figures" / f"{name}.{kind}" for kind in ("svg", "txt"))
        if not (picture.is_file() and caption.is_file()):
            return None
        self.figures[name] = caption.read_text(encoding="utf-8")
        self._written |= {picture, caption}
        return self.figures[name]

    def add_pages(self, pages: Path) -> None:
        """Write the pages of a folder, the READMEs of the tools and the changelog.

        Raises:
            StagingError: see there.
        """
        places = {path: str(path.relative_to(pages).with_suffix("")) for path in sorted(pages.rglob("*.md"))}
        places |= {
            path: f"measurements/{path.parent.name}" for path in sorted(self._root.glob("tools/*/README.md"))
        }
        places |= dict.fromkeys(self._root.glob("CHANGELOG.md"), "changelog")
        for path, place in places.items():
            text = "\n".join(self._lines(path, place, places))
            if place == "index":
                text += "\n\n" + self._order(path, text)
            self.write(f"{place}.md", text + "\n")

    def remove_the_rest(self) -> list[Path]:
        """Remove what an earlier build left there, and return which of it were pages."""
        rest = [path for path in self.folder.rglob("*") if path.is_file() and path not in self._written]
        for path in rest:
            path.unlink()
        return [path.relative_to(self.folder) for path in rest if path.suffix in (".md", ".rst")]

    def _lines(self, path: Path, place: str, places: Mapping[Path, str]) -> Iterator[str]:
        is_code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            is_code ^= bool(_FENCE.match(line.lstrip()))
            where = f"{path.relative_to(self._root)}:{number}"
            if is_code:
                yield line
            elif found := _FIGURE.fullmatch(line.strip()):
                yield self._figure(found[1], place, where)
            elif line.strip() == _REFERENCE:
                yield "\n".join(f"- {entry}" for entry in self.reference.values())
            else:
                yield _LINK.sub(lambda link: self._link(link, path, place, places, where), line)  # noqa: B023

    def _figure(self, name: str, place: str, where: str) -> str:
        if name not in self.figures:
            raise StagingError(f"{where}: no figure {name!r}; there are {', '.join(self.figures)}")
        caption = self.figures[name]
        picture = f"{'../' * place.count('/')}_images/{name}.svg"  # to be opened in its own size
        plain = caption.replace("`", "")
        return f"```{{figure}} /figures/{name}.svg\n:alt: {plain}\n:target: {picture}\n\n{caption}\n```"

    def _link(
        self, link: re.Match[str], path: Path, place: str, places: Mapping[Path, str], where: str
    ) -> str:
        target = link[1]
        name, hash_sign, anchor = target.partition("#")
        if _ELSEWHERE.match(target) or not name:
            return link[0]
        aim = Path(os.path.normpath(path.parent / name))
        if not aim.exists() or not aim.is_relative_to(self._root):
            raise StagingError(f"{where}: the link to {target!r} leads nowhere")
        if aim == self._root / "README.md" and not anchor:
            return "](/index.md)"
        if aim in places:
            return f"](/{places[aim]}.md{hash_sign}{anchor})"
        if not aim.is_file():
            raise StagingError(f"{where}: the site has no page for {target!r}; link to a file in it")
        self.write(f"files/{aim.relative_to(self._root)}", aim.read_bytes())
        return f"](/files/{aim.relative_to(self._root)})"

    def _order(self, path: Path, text: str) -> str:
        """Return the tables of contents of the site, one for each heading of the first page with links."""
        trees = []
        for section in text.split("\n## ")[1:]:
            names = [
                target.strip("/").rpartition(".")[0]
                for target in _LINK.findall(section)
                if target.startswith("/") and target.endswith((".md", ".rst"))
            ]
            if names:
                heading = section.partition("\n")[0]
                entries = "\n".join(dict.fromkeys(names))
                trees.append(f"```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```")
        if not trees:
            raise StagingError(
                f"{path.relative_to(self._root)}: expected headings with links to the pages below them"
            )
        return "\n\n".join(trees)
