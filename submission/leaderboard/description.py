"""`submission_info.yml` and the text of the pull request, in the form that the leaderboard reads.

The leaderboard's checks cut every line of the pull request's block at a `#` and strip its indentation,
and its merge job passes the values through a shell (mlcommons/submissions_algorithms 12c8e4e,
.github/workflows). So every value is one quoted line without the characters that get lost there.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Literal

Ruleset = Literal["external", "self"]

#: The leaderboard's folder for a ruleset, and its own word for it.
FOLDERS: dict[Ruleset, str] = {"external": "external_tuning", "self": "self_tuning"}
RULESET_NAMES: dict[Ruleset, str] = {"external": "external", "self": "self-tuning"}
DEFAULT_NAME = "Batched Distributed Shampoo"
DEFAULT_AUTHORS = "The algoperf-shampoo authors"
DESCRIPTIONS: dict[Ruleset, str] = {
    "external": (
        "Shampoo ([Gupta et al., 2018](https://arxiv.org/abs/1802.09568)) and its eigenvalue-corrected "
        "form, SOAP ([Vyas et al., 2024](https://arxiv.org/abs/2409.11321)), grafted to Adam, and the "
        "spectral step of Muon ([Jordan et al., 2024](https://kellerjordan.github.io/posts/muon/)), with "
        "staggered refreshes and averaged weights. A list of five hyperparameter settings."
    ),
    "self": (
        "Eigenvalue-corrected Shampoo, SOAP ([Vyas et al., 2024](https://arxiv.org/abs/2409.11321)), "
        "with staggered refreshes and averaged weights. One setting; its time scales follow from the "
        "step hint and from the measured cost of a refresh."
    ),
}
_LOST = re.compile(r"[#$`\\\n\r]")
_FOLDER_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class SubmissionInfo:
    """The fields of `submission_info.yml`, in its order.

    Raises:
        ValueError: A field is empty that must not be, or would not survive the leaderboard's
            scripts; the message names it.
    """

    submission_name: str
    submission_folder: str
    authors: str
    affiliations: str
    version: str
    ruleset: str
    framework: str
    description: str

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not value.strip() and field != "affiliations":
                raise ValueError(f"{field} must not be empty")
            if _LOST.search(value):
                raise ValueError(
                    f"{field} = {value!r} must be one line without #, $, ` and backslash, which "
                    f"the leaderboard's scripts would swallow"
                )

    def yaml(self) -> str:
        """Return the fields as YAML, one a line; a JSON string is a YAML string."""
        lines = (
            f"{field}: {json.dumps(value, ensure_ascii=False)}\n"
            for field, value in asdict(self).items()
        )
        return "".join(lines)

    def pull_request(self) -> str:
        """Return the title and the block that the pull request has to have.

        There the folder goes by its bare name: the merge job puts the path before it.
        """
        block = replace(self, submission_folder=self.submission_folder.rsplit("/", 1)[-1]).yaml()
        return (
            f"[submission] {self.submission_name}, {self.ruleset} ruleset\n\n```yaml\n{block}```\n"
        )


def describe(
    ruleset: Ruleset,
    folder_name: str,
    *,
    name: str = DEFAULT_NAME,
    authors: str = DEFAULT_AUTHORS,
    affiliations: str = "",
    version: str = "1.0",
) -> SubmissionInfo:
    """Fill in the description of this entry.

    Args:
        ruleset: "external" or "self".
        folder_name: Name of the entry's folder; it becomes part of a module's name.
        name: As it will appear on the leaderboard.
        authors: Separated by commas.
        affiliations: Separated by commas; may be empty.
        version: Of the entry.

    Raises:
        ValueError: A value will not do; the message says which and why.
    """
    if not _FOLDER_NAME.fullmatch(folder_name):
        raise ValueError(
            f"the folder's name must be lowercase letters, digits and underscores, beginning with "
            f"a letter (it is imported as a Python package), got {folder_name!r}"
        )
    return SubmissionInfo(
        submission_name=name,
        submission_folder=f"submissions/{FOLDERS[ruleset]}/{folder_name}",
        authors=authors,
        affiliations=affiliations,
        version=version,
        ruleset=RULESET_NAMES[ruleset],
        framework="PyTorch",
        description=DESCRIPTIONS[ruleset],
    )
