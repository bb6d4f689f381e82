"""The paper behind a method: what ``effdl list``, ``effdl show`` and the BibTeX of a run print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Bibliographic data, written with literal arguments so that the catalogue reads it without an import.

    Args:
        slug: the method's name everywhere (file, recipe, test, logged keys).
        title: as printed.
        authors: ``("Family, Given", ...)``.
        year: of publication.
        arxiv: arXiv identifier without version, or ``""``.
        venue: conference or journal, or ``""``.
    """

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str = ""
    venue: str = ""

    @property
    def key(self) -> str:
        """BibTeX key: first author's family name, year, slug."""
        family = self.authors[0].split(",")[0]
        return "".join(c for c in family.lower() if c.isalpha()) + f"{self.year}{self.slug.replace('-', '')}"

    @property
    def bibtex(self) -> str:
        """A complete BibTeX entry."""
        kind = "inproceedings" if self.venue else "misc"
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors), "year": str(self.year)}
        if self.venue:
            fields["booktitle"] = self.venue
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@{kind}{{{self.key},\n{body}\n}}"
