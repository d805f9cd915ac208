"""Sending adapters to a model hub."""

from pathlib import Path

from huggingface_hub import HfApi

from toolkit.adapters.card import CARD, is_ours
from toolkit.errors import refused


def upload(folder: Path, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """Upload the files in `folder` to the model `repo_id`, made if missing; return the address.

    A card there that is not ours stays as it is. Raises InputError where the hub refuses.
    """
    api = HfApi(token=token)
    with refused(f"cannot push to {repo_id!r}"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        theirs = api.file_exists(repo_id, CARD) and not is_ours(
            Path(api.hf_hub_download(repo_id, CARD))
        )
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[CARD] if theirs else None,
        )
    return str(url)
