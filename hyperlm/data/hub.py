"""Data sets of the Hugging Face hub: files of a repository, fetched once into the hub's own cache."""

import re
from pathlib import Path

from hyperlm.data.documents import DataError
from hyperlm.data.folders import PACKED
from hyperlm.data.formats import FORMATS

SCHEME = "hf:"
# owner/name, a revision there or at the end, and a path within
ADDRESS = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>[^@]*[^@/]))?/?(?:@(?P<last>[^@]+))?")
DATA = [suffix for suffix, form in FORMATS.items() if form.rows] + [".txt"]  # a card and code that loads it are no text of a data set


def snapshot(address: str, where: str) -> tuple[str, Path]:
    """A name, and where the file or folder is on this machine, of `hf://datasets/owner/name[@revision][/path]`.

    Raises:
        DataError: beginning with `where`, if it cannot be fetched.
    """
    if not (match := ADDRESS.fullmatch(address)):
        raise DataError(f"{where}: not an address of a data set; write hf://datasets/owner/name, with /path and @revision if need be")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as e:
        raise DataError(f"{where}: fetching it takes huggingface_hub, which is not installed: pip install 'hyperlm-torch[hub]'") from e
    name, path = match["name"], match["path"] or ""
    data = [f"*{suffix}{packed}" for suffix in DATA for packed in ("", *PACKED)] + ["*.zip"]
    wanted = [path, f"{path}/*"] if path else data
    try:
        root = snapshot_download(name, repo_type="dataset", revision=match["revision"] or match["last"], allow_patterns=wanted)
    except (OSError, ValueError) as e:  # what the hub's errors and those of the network have in common
        raise DataError(f"{where}: cannot be fetched ({' '.join(str(e).split()):.200}); check the name and the network") from e
    return f"{name}/{path}".rstrip("/"), Path(root, path)
