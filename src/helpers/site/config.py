"""What the site's configuration says."""

from __future__ import annotations

from typing import Any

import yaml

from helpers.errors import UserError
from helpers.runtime import root


def config() -> dict[str, Any]:
    """The content of ``_config.yml``.

    Raises:
        UserError: if it cannot be read.
    """
    path = root() / "_config.yml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it from git.") from error


def repository() -> dict[str, str]:
    """``url``, ``branch`` and ``path_to_book`` of the repository, from ``_config.yml``, which alone has them."""
    entry = {"branch": "main", "path_to_book": ""} | (config().get("repository") or {})
    if not entry.get("url"):
        raise UserError("_config.yml has no repository.url; set it to the address of the public repository.")
    return entry | {"url": entry["url"].rstrip("/").removesuffix(".git")}
